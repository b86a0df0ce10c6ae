// Chooses the table of kernels among those that this build contains and this processor supports.
#include "kernels.h"

#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glimmer {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
}
bool has_amx() {
#if defined(__linux__)
    // A process must ask Linux for permission to use AMX tiles: ARCH_REQ_XCOMP_PERM for feature 18, tile data.
    unsigned a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
    return has_avx512() && tiles && bf16 && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

struct Found {
    const Kernels* tables[4];
    int n = 0;
    std::string names;
    Found() {
        add(portable);
#if defined(__x86_64__)
        if (has_avx2()) add(avx2);
        if (has_avx512()) add(avx512);
        if (has_amx()) add(amx);
#endif
    }
    void add(const Kernels& k) {
        tables[n++] = &k;
        names += (names.empty() ? "" : " ") + std::string(k.name);
    }
};

const Found& found() {
    static const Found f;
    return f;
}

const Kernels* chosen = nullptr;

}  // namespace

const Kernels& kernels() {
    if (!chosen) chosen = found().tables[found().n - 1];
    return *chosen;
}

const char* available() { return found().names.c_str(); }

void select(const char* name) {
    for (int i = 0; i < found().n; i++)
        if (std::string(found().tables[i]->name) == name) {
            chosen = found().tables[i];
            return;
        }
    throw std::invalid_argument(std::string("no kernels ") + name + ", only " + available());
}

}  // namespace glimmer
