"""How well a base is personalized from a few photos: subjects × presets × seeds, judged by two image models.

`python -m veneer.pipelines.few_photos PHOTOS --subjects NAME … --presets quick balanced --seeds 0 1 2` trains each combination
with the pipeline of `veneer personalize`, generates the same prompts with the adapter and with the bare base, and scores both.
What exists in the output folder is not computed again.

| module | idea |
|---|---|
| `config.py` | subjects, class words, presets, prompts |
| `runs.py` | training runs and generated images, on disk |
| `judges.py` | the image models that score, and features on disk |
| `scores.py` | the arithmetic: similarity, identification, prompt, ground, place, drift |
| `report.py` | means and intervals over seeds, tables |
| `grids.py` | image grids |
"""
