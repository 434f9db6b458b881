"""Drop-ins for other code bases: their own names and signatures, with the step done in one pass.

There is one module for each code base, imported by its name; none is imported with `fastddim`
itself. A drop-in does not change a user's images: where its peer deviates from the paper, it
deviates in the same way and says so.

To add one:

1. Name the module after the code base. Its docstring shows the change that a user makes, as an
   example that runs, and lists where the peer deviates from the paper.
2. Keep the peer's names, its signatures and its calls for noise. Cases that the kernel does not
   cover go to the peer's own code. Methods that the peer calls on its objects and the drop-in does
   not are named in a `_hooks.Hooks`, and called where they are overridden. Indices that users give
   go through `_indices`.
3. Prepare the loop of a policy, which walks a scheduler of diffusers, by `_policies`. Otherwise
   compute the coefficients by the peer's operations and in its dtype, as a `fastddim.plan.Row` with
   one entry a step, and make the table by `_tables.step_table`. Where each step is a call of its
   own, keep the table in a cache as `_tables` describes.
4. Add the peer to `tests/support/dropins`, a test that compares the two live, the module to
   `docs/reference/integrations.md`, the change to `docs/migrating.md`, and a line to
   `benchmarks/bench_dropins.py`, or a loop to `benchmarks/bench_policies.py`.
"""
