"""DeepSeek-V4 for vLLM: a thin adapter over `dsv4_plugin`.

vLLM calls `register` in each of its processes. What fails here must fail loudly: vLLM only logs a
plugin that cannot be imported, so this module imports nothing until it is called.
"""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called any number of times."""
    from vllm_ext.registration import register_all

    register_all()
