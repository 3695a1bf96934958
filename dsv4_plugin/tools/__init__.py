"""What is not needed to serve: the `dsv4` command, checkpoints made, converted and looked into,
plans, checks of a GPU, and the bench."""
