"""Drop-ins for other code bases: their own names and signatures, with the step done in one pass.

One module each, imported by its name; none is imported with `fastddim` itself. A drop-in changes
nobody's images: where its peer deviates from the paper it deviates in the same way, and says so.
"""
