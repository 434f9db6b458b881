"""Drop-ins for other code bases, with their own names and signatures and a step in one pass.

There is one module for each code base, imported by its name; `fastddim` itself imports none of
them. A drop-in does not change a user's images: where its peer deviates from the paper, the drop-in
deviates in the same way and says so.

To add one:

1. Name the module after the code base. Its docstring shows the change that a user makes, as an
   example that runs, and lists the deviations of the peer from the paper.
2. Keep the peer's names, its signatures and its calls for noise. Cases that the kernel does not
   cover go to the peer's own code. Name the methods that the peer calls on its objects, and that
   the drop-in does not call, in a `_hooks.Hooks`, and call those that are overridden. Pass indices
   that users give through `_indices`.
3. If the drop-in is the loop of a policy, which walks a scheduler of diffusers, prepare it with
   `_policies`. Otherwise compute the coefficients with the peer's operations and in its dtype, as a
   `fastddim.plan.Row` with one entry a step, and make the table with `_tables.step_table`. If each
   step is a call of its own, keep the table in a cache as `_tables` describes.
4. Add the peer to `tests/support/dropins`, a test that compares the two live, the module to
   `docs/reference/integrations.md`, the change to `docs/migrating.md`, and a line to
   `benchmarks/bench_dropins.py`, or a loop to `benchmarks/bench_policies.py`.
"""
