"""A GPU that is not there: kernels checked on a CPU.

interpreter   makes Triton's own interpreter right for bf16 and fp8, and strict
targets       compiles every launch for a GPU that is absent (`FakeGPU`)
emulator      executes the compiled PTX in numpy (`EmulatedGPU`)
binary        registers, spills and instruction mix of what was compiled
roofline      counters to lower bounds
mode          which of these a test run uses
"""
