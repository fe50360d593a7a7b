"""No malformed file loads wrongly: thousands of them, each rejected with a clear error or loaded as its bytes say.

`good_files` and `good_guides` of every format, for small `models`; mutations `of_bytes`, `of_headers`, `of_tensors`,
`of_claims`, `of_json` and `of_pictures`; slow reference readers, without veneer (`bytes_read`, `equations`,
`meanings`, `peft_meanings`, `guide_meanings`); the `verdict` on one file; and a command:

    python -m tests.formats.malformed --count 10000 --seed 0
    python -m tests.formats.malformed --seed 0 --only 4711      one of them alone
    python -m tests.formats.malformed --formats controlnet,ip_adapter
"""
