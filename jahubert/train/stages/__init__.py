"""The stages of the pipeline, one module per stage; `experiment.registry.STAGES` lists them in order.

A stage has `VERSION` (increased when its result changes), a frozen `Config` whose defaults are the paper's,
and `run(config, out) -> metrics`. It reads only what its config names, writes only under `out`, and draws
random numbers only from `config.seed`. With `KEEP = False` it runs every time; `kept(config, out)` is called
when an existing result is kept.
"""
