"""What `veneer bench` times: contests between veneer and others, run interleaved and read as ratios. One file a row."""
