"""Jobs on other machines, or on several: what a job is, its scripts, and nemo-run, which submits it (docs/launching.md).

May import: config, config_files, models, rollout, types, observability. Only `nemo` imports nemo_run.
"""
