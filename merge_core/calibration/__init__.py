"""Calibrations: numbers of a recipe that are measured or learned on data, by whole models that run.

`document.py` says what was asked: a recipe with `calibrate`. `methods/` has one file for each way of calibrating,
`method.py` what such a file defines, `bench.py` what it is given. `plan.py` says what a calibration takes, `run.py`
carries it out. What runs models and reads data is not the core's affair: it is given as `Models` (`models.py`).

**To add a way of calibrating**, add a file to `methods/` with a `Calibrator` (or a `Learner`, if it learns
coefficients by gradient): its fields are the keys beside `method`, `serves` names the merge methods whose recipes it
fills in, `run` does the work and says which files of statistics it wrote (`Made`). It is then in the schema, the
service, the documentation and the tests of all. Whoever measures instead of learning needs of the bench:

    bench.groups                    # batches of data, for each of the document's `data`; batch.expert: whose they are
    with bench.opened(1) as module: # model 1 of the recipe, in float32 on the device (None: the base)
        bench.models.run(module, batch).logits
    bench.shapes                    # the tensors that the recipe merges: name → shape
    bench.tensors(module)           # the module's parameters and buffers by these names
    bench.tick("measuring", done, total)      # progress; raises where the job is to stop
    bench.known("fisher 1"), bench.note(...)  # what an earlier attempt came to; `bench.folder` survives a kill
    bench.write("fisher-1.safetensors", {name: tensor})

**What comes out** is an artifact with the files of statistics, `recipe.yml`, which names them, the merged model if it
was asked for, and `calibration.json`:

    {"version": 1, "method": "expert_merging", "objective": "distillation", "steps": 40,
     "best_step": 32,                         # null: the last one is the result
     "data": [{"model": "chat", "file": "chat.jsonl", "samples": 5}, …],
     "curves": [{"name": "training", "points": [{"step": 0, "loss": 1.31, "logits": 1.2, "hidden": 0.11}, …]},
                {"name": "check", "points": [{"step": 0, "loss": 1.4, "chat": 1.5, "labels": 2.1}, …]}],
     "lines": [{"name": "task arithmetic at 0.3", "loss": 1.37, "labels": 2.2}],
     "tensors": [{"tensor": "model.layers.0.mlp.up_proj.weight", "coefficients": [[0.1, 0.2], [0.3, 0.1]],
                  "importance": 0.02}, …]}

A point has `step` and `loss`, and whatever else was measured there, always numbers; every point of a curve may have
other names beside these two. Where there is `across`, a step is what that names, such as `"q"`, and not a number of
steps. `lines` are what plain merges come to on the data of the curve `check`, to be drawn through it. `coefficients`
has a list for each model. A method that measures may leave all but `version`, `method` and `data` away, or add to it.
"""
