"""The loop around the model, which makes a run of single steps.

`Setup` is what options come to; `Loop` owns `Buffers` and `Counters`, and has `Step` take the steps
of a plan, one by one or from `Programs` that were captured as CUDA graphs; `LoopPool` keeps loops
between calls. `Walk` takes the same steps as a function, inside programs. `fastddim.stream`
schedules steps of the same kind.
"""
