"""What `dsv4 bench` is made of: requests, the client that times them, measures, charts, report.

| module | what it does |
|---|---|
| `datasets` | the requests of a level, in sessions |
| `client` | streams them over HTTP and notes when tokens come |
| `server` | what a server tells of itself: model, versions, counters |
| `measures` | from timed answers to a level's numbers |
| `run` | levels one after another, kept as they end |
| `report` | a run as JSON, runs as a page, two runs as ratios |
| `charts` | the four charts |
"""
