"""Assumptions of the predictions about an H100 and its host, each with its source.

None was measured on a GPU for this package. A `prior` is an estimate without a document to cite:
the first measurement will say how good it is.
"""

from __future__ import annotations

from typing import NamedTuple

GUIDE = "CUDA C++ Programming Guide, throughput of native arithmetic instructions, 9.0"
REHEARSAL = "timed without a GPU, launches replaced by stand-ins"
HOST = "prior; facebookresearch/HolisticTraceAnalysis documents 5 to 20 µs for a launch"
DEVICE = "prior, the gap to the next kernel of a CUDA graph included"
GRAPHS = "NVIDIA, Constant Time Launch for Straight-Line CUDA Graphs: 2.5 µs and 1 ns a node"


class Assumption(NamedTuple):
    value: float
    unit: str
    meaning: str
    source: str


ASSUMPTIONS: dict[str, Assumption] = {
    "copy_bandwidth": Assumption(
        3.0e12,
        "bytes/s",
        "a copy from device memory to device memory, bytes read and written",
        "measured elsewhere on an H100 SXM; 90 % of the data sheet's 3.35e12",
    ),
    "streaming_share": Assumption(
        0.95,
        "",
        "of the copy's bandwidth, what a kernel with three streams reaches",
        "prior; two reads to a write should be no harder on memory than one to one",
    ),
    "multiprocessors": Assumption(132, "", "of the H100 SXM", "NVIDIA's data sheet"),
    "schedulers": Assumption(
        4, "", "of a multiprocessor, each issues an instruction a cycle", "NVIDIA's Hopper paper"
    ),
    "clock": Assumption(
        1.755e9,
        "Hz",
        "at which every scheduler is taken to issue in every cycle",
        "the boost clock of the H100 PCIe (chipsandcheese.com); SXM parts report 1.98e9, "
        "where this amounts to issuing in 89 % of the cycles",
    ),
    "logic_cycles": Assumption(
        2, "cycles", "of integer, logic, comparison, selection and moves of bytes", f"{GUIDE}: 64"
    ),
    "product_cycles": Assumption(
        2, "cycles", "of an integer multiply-add, also to 64 bits", f"{GUIDE}: 64"
    ),
    "special_cycles": Assumption(
        8, "cycles", "of MUFU and of F2I, I2F and F2F, which share its unit", f"{GUIDE}: 16"
    ),
    "kernel": Assumption(
        2.0e-6, "s", "between two events around a kernel that does nothing", "prior"
    ),
    "dependent_read": Assumption(
        4.0e-7,
        "s",
        "a read that another waits for: the row, the coefficients, the key",
        "690 cycles on a GH200 in github.com/markdewing/AI_kernels",
    ),
    "dependent_reads": Assumption(3, "", "of an update, one after the other", "the kernel"),
    "tensor_float16": Assumption(989e12, "FLOP/s", "peak, dense", "NVIDIA's data sheet"),
    "vector_float32": Assumption(67e12, "FLOP/s", "peak without TF32", "NVIDIA's data sheet"),
    "arithmetic_share": Assumption(
        0.35, "", "of the peak, what products and convolutions of these sizes reach", "prior"
    ),
    "small_kernel": Assumption(2.2e-6, "s", "a kernel that has little to do", DEVICE),
    "small_product": Assumption(4.5e-6, "s", "a small matrix product", DEVICE),
    "small_convolution": Assumption(6.0e-6, "s", "a small convolution itself", DEVICE),
    "small_attention": Assumption(6.0e-6, "s", "a small attention", DEVICE),
    "host_view": Assumption(2e-6, "s", "of the host for a view", HOST),
    "host_scalar": Assumption(3e-6, "s", "for arithmetic on a number of the schedule's", HOST),
    "host_wait": Assumption(12e-6, "s", "for a number that is fetched from the device", HOST),
    "host_pointwise": Assumption(7e-6, "s", "for one kernel", HOST),
    "host_product": Assumption(12e-6, "s", "for a matrix product", HOST),
    "host_norm": Assumption(18e-6, "s", "for a group norm", HOST),
    "host_attention": Assumption(20e-6, "s", "for an attention", HOST),
    "host_convolution": Assumption(25e-6, "s", "for a convolution", HOST),
    "host_scheduler": Assumption(
        20e-6, "s", "for the Python of diffusers' step beside its operations", "prior"
    ),
    "host_step": Assumption(
        18e-6,
        "s",
        "for update and advance, the C++ operators called from Python",
        f"13 µs {REHEARSAL}, and two launches of 2.5 µs",
    ),
    "host_call": Assumption(
        150e-6,
        "s",
        "for a call of a Sampler beside its steps: checks, keys, x_T in, samples out",
        "60 µs timed on an AMD EPYC for samples on the CPU; the rest is a prior",
    ),
    "host_state": Assumption(
        0.6e-6,
        "s",
        "for each parameter, whose address a captured loop compares once a call",
        "0.4 to 0.7 µs timed on an AMD EPYC",
    ),
    "host_replay": Assumption(
        10e-6, "s", "to launch a graph from Python", f"{GRAPHS}; the rest is Python's, a prior"
    ),
    "graph_gap": Assumption(
        4.5e-6, "s", "from the end of a graph to the start of the next", "prior"
    ),
    "host_compiled": Assumption(
        80e-6,
        "s",
        "to call a function compiled with CUDA graphs: guards, copies of inputs, replay",
        "prior",
    ),
}


def assumed(name: str) -> float:
    return ASSUMPTIONS[name].value
