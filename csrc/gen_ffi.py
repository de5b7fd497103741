"""Write the cffi glue from skl.h, so that the C declarations exist once. CMake runs: gen_ffi.py SKL_H OUT_C."""

import sys
from pathlib import Path

import cffi

header, out = map(Path, sys.argv[1:])
declarations = header.read_text().split("/* [cffi] */", 1)[1].split("/* [/cffi] */", 1)[0]
ffi = cffi.FFI()
ffi.cdef(declarations)
ffi.set_source("sklformat._native", '#include "skl.h"')
ffi.emit_c_code(str(out))
