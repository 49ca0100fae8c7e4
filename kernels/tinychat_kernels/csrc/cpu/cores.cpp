// How many physical cores this process may use.
#include "pool.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace tinychat {
namespace {

#if defined(__linux__)

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// Hardware threads of one core name the same siblings.
int cores_in_cpuset() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 0;
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const std::string name = std::to_string(cpu);
        const std::string siblings =
            first_line("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
        cores.insert(siblings.empty() ? name : siblings);
    }
    return static_cast<int>(cores.size());
}

// The quota of a container, rounded up to whole CPUs; 0 where there is none.
int cpu_quota() {
    std::istringstream words(first_line("/sys/fs/cgroup/cpu.max"));
    double quota = 0, period = 0;
    if (!(words >> quota >> period) || period <= 0) return 0;
    return std::max(1, static_cast<int>((quota + period - 1) / period));
}

#else

int cores_in_cpuset() { return 0; }
int cpu_quota() { return 0; }

#endif

}  // namespace

int usable_cores() {
    int cores = cores_in_cpuset();
    if (cores == 0) cores = static_cast<int>(std::thread::hardware_concurrency());
    if (const int quota = cpu_quota(); quota > 0) cores = std::min(cores, quota);
    return std::max(cores, 1);
}

}  // namespace tinychat
