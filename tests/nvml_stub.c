/* A stand-in for NVIDIA's libnvidia-ml.so.1 with two GPUs, so that UsageMonitor's real NVML path
 * runs on machines without one. Signatures follow NVIDIA's nvml.h; 0 is NVML_SUCCESS.
 *
 * The environment chooses what goes wrong:
 *   STUB_GPUS=n        number of GPUs (2)
 *   STUB_INIT=code     what nvmlInit returns (0)
 *   STUB_LOSE_AFTER=n  GPU 1 is lost after n calls for its utilisation (never)
 *   STUB_BROKEN=i      GPU i cannot be opened (none)
 */
#include <stdio.h>
#include <stdlib.h>

#define UNINITIALIZED 1
#define INVALID_ARGUMENT 2
#define GPU_IS_LOST 15

typedef struct { unsigned int index; } Device;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;

static Device devices[2] = {{0}, {1}};
static const char *names[2] = {"Stub Large", "Stub Small"};
static const unsigned int loads[2] = {90, 10};
static const unsigned long long totals[2] = {80ULL << 30, 8ULL << 30};
static const unsigned long long used[2] = {60ULL << 30, 1ULL << 30};
static int open_sessions = 0;
static int calls = 0;

static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int nvmlInitWithFlags(unsigned int flags) {
    int code = setting("STUB_INIT", 0);
    (void)flags;
    if (code == 0) open_sessions++;
    return code;
}

int nvmlShutdown(void) {
    if (open_sessions == 0) return UNINITIALIZED;
    open_sessions--;
    return 0;
}

int stub_open_sessions(void) { return open_sessions; }

int nvmlDeviceGetCount_v2(unsigned int *count) {
    if (open_sessions == 0) return UNINITIALIZED;
    *count = (unsigned int)setting("STUB_GPUS", 2);
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if (open_sessions == 0) return UNINITIALIZED;
    if (index > 1) return INVALID_ARGUMENT;
    if ((int)index == setting("STUB_BROKEN", -1)) return GPU_IS_LOST;
    *device = &devices[index];
    return 0;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned int length) {
    snprintf(name, length, "%s", names[device->index]);
    return 0;
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    int limit = setting("STUB_LOSE_AFTER", -1);
    if (open_sessions == 0) return UNINITIALIZED;
    if (device->index == 1 && limit >= 0 && calls++ >= limit) return GPU_IS_LOST;
    rates->gpu = loads[device->index];
    rates->memory = 0;
    return 0;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (open_sessions == 0) return UNINITIALIZED;
    memory->total = totals[device->index];
    memory->used = used[device->index];
    memory->free = memory->total - memory->used;
    return 0;
}

const char *nvmlErrorString(int code) {
    return code == GPU_IS_LOST ? "GPU is lost" : "an error of the stub";
}
