"""Model cards of finished runs, and their upload to the model hub."""

from .run_record import RunRecord, read_run
from .upload import upload, write_token
from .upload_folder import PushOptions, write_folder

__all__ = ["PushOptions", "RunRecord", "read_run", "upload", "write_folder", "write_token"]
