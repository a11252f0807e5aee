"""How a program proves that it ran to its last line, in each language.

Exit code 0 is not proof: `os._exit(0)` before the tests gives it too. So the program is run by a
few lines that read a random token from descriptor 3, close it, run the program, and only then, in
the process that began, write the token to descriptor 4.
"""

from __future__ import annotations

PYTHON = """\
import os, sys

def run():
    token, write, me = os.read(3, 64), os.write, os.getpid
    os.close(3)
    began = me()
    path, *packages = sys.argv[1:]
    sys.path += packages
    sys.argv = [path]
    main = type(sys)("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    with open(path, encoding="utf-8") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)
    if me() == began:
        write(4, token)

run()
"""

JAVASCRIPT = """\
const { readSync, writeSync, closeSync } = require("fs");
const token = Buffer.alloc(64);
const length = readSync(3, token);
closeSync(3);
require("module")._load(process.argv[2], null, true);
writeSync(4, token, 0, length);
"""

# Linked with --wrap=main: the C library calls __wrap_main, and main stays what it is to C++.
CPP = """\
#include <unistd.h>
extern "C" int __real_main(int, char**, char**);
extern "C" int __wrap_main(int count, char** values, char** environment) {
    char token[64];
    const pid_t began = getpid();
    const ssize_t length = read(3, token, sizeof token);
    close(3);
    const int code = __real_main(count, values, environment);
    if (getpid() == began && write(4, token, length) != length) return 1;
    return code;
}
"""
