"""Images with several labels: label cells of tables, and splits that keep the share of each label."""
