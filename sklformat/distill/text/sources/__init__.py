"""
From files and datasets of any kind to rows, without tokens: what documents and chats are made of.

hub        the only door to datasets: rows of Hugging Face datasets
json_rows  rows of .jsonl, a line each, and of .json, an array of them
prose      plain text: one text per file, or parts of a large one
rows       the rows of all files that a user chose
selection  which files these are
streams    bytes of files, unpacked, and their text
tables     rows of Parquet and Arrow files
"""
