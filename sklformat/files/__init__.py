"""
Files wherever they lie, on disks, in memory or behind URLs; knows nothing of the format.

arrow        the only door to pyarrow: tables in Parquet and Arrow files
copies       local copies of what was read behind URLs, bounded in bytes
directories  directories that appear whole or not at all
disk         append, sync, rename and lock, so that a crash loses nothing
places       where a file lies: a path of this machine, or a URL
regular      regular files and nothing else, opened or refused at once
remote       the only door to fsspec: files behind URLs
storage      the bytes of a sealed file: mapped, read piece by piece, or behind a URL
yaml         the only door to PyYAML: settings in YAML and JSON
zstd         the only door to zstandard: streams of bytes, packed and unpacked
"""
