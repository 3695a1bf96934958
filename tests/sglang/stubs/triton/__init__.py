"""TEST USE ONLY: SGLang's modules that define kernels can be imported; none can be launched."""

from stand_in import StandIn, stand_in

StandIn.absent = ("triton.runtime.driver",)


class constexpr:
    def __init__(self, value=None):
        self.value = value


stand_in(
    "triton",
    __version__="3.0.0",
    constexpr=constexpr,
    cdiv=lambda a, b: -(a // -b),
    next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
)
