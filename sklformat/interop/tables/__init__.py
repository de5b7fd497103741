"""Tables of any kind as rows of numbers, and plain columns written.

cells    one row's lists of numbers
files    tables in one file or several, and the writer of plain columns
jsonl    JSON lines
npz      npz, and other stacked arrays
parquet  Parquet and Arrow
"""
