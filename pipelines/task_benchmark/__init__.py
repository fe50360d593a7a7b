"""Benchmark of combinations of adapters on several tasks: photos of clothes, digits, and icons in two styles.

`python -m veneer.pipelines.task_benchmark CLOTHES --seeds 0 1 2` trains what is missing in its folder, and writes
`tasks.json` and `tasks.md`.

| module | contents |
|---|---|
| `icons.py` | shapes rendered as filled icons and as outlines, with the shape or the place as class |
| `task_images.py` | the training, validation and test images of each task, on disk |
| `runs.py` | training runs, and the choice of their learning rate on validation images |
| `joint.py` | all tasks in one run, compared with one adapter for each task |
| `few_shot.py` | few images of one task, and adapters of the other tasks: fusion, soup, MerA |
| `styles.py` | from one style of icons to the other without its labels: MAD-X, BAD-X |
| `report.py` | means, intervals and paired differences over seeds, as JSON and Markdown |
"""
