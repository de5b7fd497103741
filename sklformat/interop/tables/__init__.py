"""
Tables of any kind as rows of numbers, and plain columns written.

array_records  the only door to array_record
cells          one row's lists of numbers
examples       numbers of tf.train.Example
exports        sequences as files of other systems have them
files          tables in one file or several, and the writers of tables
hdf5           arrays of HDF5 files
jsonl          JSON lines
npz            npz, and other stacked arrays
parquet        Parquet and Arrow
pickles        the only door to pickles: files of PyTorch, arrays of objects
safetensors    arrays of safetensors files
"""
