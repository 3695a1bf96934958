"""vLLM 0.33's configurations on a GPU that is not there: a JSON list, one for each command line.

    python -m tests.vllm033.cuda_config CAPABILITY LINE ...    # as after `vllm serve`

With vLLM's Python files in front of the path. Its compiled ones, the driver's library among what
they link, are stood in for: modules that are empty, and answers of "no" where vLLM asks what they
support. Up to the engine's configuration and the model class nothing else of them is used.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from types import ModuleType

import torch

EMPTY = (
    "_C_stable_libtorch",
    "_moe_C_stable_libtorch",
    "vllm_flash_attn._vllm_fa2_C",
    "vllm_flash_attn._vllm_fa3_C",
)
NAME = "a GPU that is not there"


def stand_in() -> None:
    """For vLLM's compiled modules, before they are imported."""
    for name in EMPTY:
        sys.modules[f"vllm.{name}"] = ModuleType(name)
    questions = torch.library.Library("_C", "DEF")
    for question in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
        questions.define(f"{question}(int capability) -> bool")
        questions.impl(question, lambda capability: False, "CompositeExplicitAutograd")
    global _library
    _library = questions


def fake_platform(capability: tuple[int, int]) -> None:
    """vLLM's CUDA platform, on one such GPU of 80 GiB."""
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Fake(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return NAME

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, ids: list[int]) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return 8

    platforms._current_platform = Fake()
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_name = lambda device=None: NAME


class Said(logging.Filter):
    """What the plugin's own logger says. (vLLM takes the handlers off its loggers on the way.)"""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append(record.getMessage())
        return True


def configure(line: str) -> dict[str, object]:
    """What the engine would be made of, and what the log says of it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = Said()
    logging.getLogger("vllm.dsv4").addFilter(said)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for option in ("--tool-call-parser", "--reasoning-parser"):
        if option not in parser._option_string_actions:
            parser.add_argument(option)
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    args = parser.parse_args(["--model", *shlex.split(line)])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    logging.getLogger("vllm.dsv4").removeFilter(said)
    found = {
        "type": config.model_config.hf_config.model_type,
        "block_size": config.cache_config.block_size,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "v2_runner": config.use_v2_model_runner,
        "said": said.lines,
    }
    if found["type"] == "dsv4_plugin":
        from vllm.v1.attention.backend import AttentionCGSupport

        from vllm_ext.cache import MetadataBuilder
        from vllm_ext.model import DeepseekV4ForCausalLM

        support = MetadataBuilder.get_cudagraph_support(config, None)
        found["whole_graphs"] = support != AttentionCGSupport.NEVER
        found["model"] = DeepseekV4ForCausalLM.__module__
    return found


def main(capability: str, *lines: str) -> None:
    stand_in()
    fake_platform(tuple(map(int, capability.split("."))))
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    registry._run_in_subprocess = lambda function: function()  # which would have no such platform
    print("\n" + json.dumps([configure(line) for line in lines]))


if __name__ == "__main__":
    main(*sys.argv[1:])
