"""DeepSeek-V4 for SGLang: a thin adapter over `dsv4_plugin`.

SGLang calls `register` in its server, scheduler and detokenizer processes, and only logs a plugin
that raises. So this module imports nothing until it is called, and `active.check_active`
refuses to serve where a hook did not take.
"""


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`; may be called any number of times."""
    from sglang_ext.registration import register_all

    register_all()
