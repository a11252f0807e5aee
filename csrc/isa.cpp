// The best instruction set of this processor that the library was compiled for.
extern "C" __attribute__((visibility("default"))) int fedsim_isa() {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
