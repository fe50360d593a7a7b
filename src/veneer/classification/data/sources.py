"""The one door to labelled pictures: a folder, a table, a folder of the `datasets` library, or the digits at hand."""

from pathlib import Path

from veneer.training.data.image_io import DataError

from .csv_table import metadata_files, read_csv, read_metadata
from .digits import digits
from .hf_dataset import read_rows, row_files
from .image_folder import read_folder
from .labeled_images import SPLITS, Example, Source, Split

__all__ = ["SPLITS", "Example", "Source", "Split", "find_pictures"]
_EXPECTED = "a folder of CLASS/pictures or train/CLASS/pictures, a CSV of path,label[,split], or the word digits"


def find_pictures(data: str | Path | None = None) -> Source:
    """The labelled pictures of `data`; none is decoded yet, see `check_pictures`.

    Args:
        data: one of
            - a folder of `CLASS/pictures`, or with train, validation and test folders of them: see `read_folder`;
            - a CSV, TSV or text table of path, label and perhaps split: see `read_csv`;
            - a folder as the `datasets` library writes it: pictures with `metadata.csv` or `metadata.jsonl` (`read_metadata`),
              Parquet files or `save_to_disk` (`read_rows`; needs pyarrow);
            - `digits`, or None: scikit-learn's 1,797 handwritten digits. A folder or file of that name is `./digits`.

    Raises:
        DataError: nothing of the kind, or something in it cannot be used.
    """
    if data is None or str(data) == "digits":
        return digits()
    path = Path(data).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
            message = f"{path}: a file ending in {path.suffix or 'nothing'}; expected {_EXPECTED}."
            raise DataError(message, file=path, where="suffix", given=path.suffix)
        return read_csv(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected {_EXPECTED}. Check the name.", file=path, given="missing")
    tables = metadata_files(path)
    if tables:
        return read_metadata(path, tables)
    rows = row_files(path)
    return read_rows(path, rows) if rows else read_folder(path)
