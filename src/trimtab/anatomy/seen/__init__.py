"""Descriptions that are seen: a model is run on an example and watched.

watch       the whole: from one pass to an `Anatomy`
inputs      what the model is called with, and the same with a place hidden
record      one pass: calls of modules, and from what every tensor came
chains      which modules are blocks
towers      what is read off the blocks of a tower
probe       measured: which mask hides, who sees whom
rows        the same on few rows of the example, where these tell as much as all
masks       where a mask is seen, in which sense, and what hides tokens without one
order       whether a tower is causal, or keeps tokens apart in another way
sublayers   the parts of one block, which runs alone: `provenance` (its operations), `residual` (the sums on its
            stream), `proof` (each part is changed, and must show)
"""
