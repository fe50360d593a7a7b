"""Quality of personalization from a few photos: subjects × presets × seeds, scored by two image models.

`python -m veneer.pipelines.few_photos PHOTOS --subjects NAME … --presets quick balanced --seeds 0 1 2` trains each combination
with the pipeline of `veneer personalize`, generates the same prompts with the adapter and with the base, and scores both.
Existing results in the output folder are reused.

| module | contents |
|---|---|
| `config.py` | subjects, class words, presets, prompts |
| `runs.py` | training runs and generated images, on disk |
| `judges.py` | the scoring image models, and cached features |
| `scores.py` | metrics: similarity, identification, prompt, background, place, drift |
| `report.py` | means and intervals over seeds, tables |
| `grids.py` | image grids |
"""
