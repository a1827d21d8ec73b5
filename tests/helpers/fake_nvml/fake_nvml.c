/* A stand-in for libnvidia-ml.so.1: the calls that gpu_gauges.py makes, answered from a text file.
 *
 * FAKE_NVML_STATE names the file, read afresh at every call. A line is "key value"; the last one of a
 * key holds. <i> is the number of a board, <function> the full name of a call:
 *   count 2                  boards                       mig.<i> 2          MIG instances of a board
 *   power.<i> 250000         a reading (see the calls below for names and defaults)
 *   error.<function> 3       the call returns this code   error.<function>.<i> 3   for one board
 *   hang.<function> 1        the call does not return while the line is there
 * FAKE_NVML_TOLD names a file that gets a line of every answer that the state file gave.
 * With -DOLD_DRIVER the symbols that drivers gained later are missing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_BOARDS 8
#define MAX_MIG 7
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef struct { int board, instance; } Device; /* instance -1: the board itself */
typedef unsigned long long u64;

static Device devices[MAX_BOARDS][MAX_MIG + 1];
static int started = 0;

static void tell(const char *key, u64 value) {
    const char *path = getenv("FAKE_NVML_TOLD");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %llu\n", key, value);
    fclose(file);
}

static u64 lookup(const char *key, u64 fallback) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256], name[200];
    u64 value;
    int found = 0;
    if (!file) return fallback;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%199s %llu", name, &value) == 2 && !strcmp(name, key)) fallback = value, found = 1;
    fclose(file);
    if (found) tell(key, fallback);
    return fallback;
}

static u64 reading(const char *name, int board, u64 fallback) {
    char key[200];
    snprintf(key, sizeof key, "%s.%d", name, board);
    return lookup(key, fallback);
}

static int enter(const char *function, int board) {
    char key[200];
    snprintf(key, sizeof key, "hang.%s", function);
    while (lookup(key, 0)) usleep(2000);
    snprintf(key, sizeof key, "error.%s", function);
    u64 code = lookup(key, SUCCESS);
    code = board < 0 ? code : reading(key, board, code);
    return code == SUCCESS && !started ? UNINITIALIZED : (int)code;
}

#define ENTER(device)                                              \
    do {                                                           \
        int code = enter(__func__, (device) ? (device)->board : -1); \
        if (code) return code;                                     \
    } while (0)
#define NONE ((Device *)NULL)
#define BOARD_ONLY(device) do { if ((device)->instance >= 0) return NOT_SUPPORTED; } while (0)

static Device *device_at(int board, int instance) {
    Device *device = &devices[board][instance + 1];
    device->board = board;
    device->instance = instance;
    return device;
}

static void uuid_of(const Device *d, char *out, unsigned size) {
    if (d->instance < 0) snprintf(out, size, "GPU-%08x-0000-0000-0000-000000000000", d->board + 1);
    else snprintf(out, size, "MIG-%08x-%04x-0000-0000-000000000000", d->board + 1, d->instance + 1);
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    started = 1;
    int code = enter(__func__, -1);
    if (code) started = 0;
    return code;
}

int nvmlShutdown(void) { ENTER(NONE); started = 0; return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) { ENTER(NONE); *count = lookup("count", 2); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) {
    ENTER(NONE);
    if (index >= lookup("count", 2)) return INVALID_ARGUMENT;
    *out = device_at(index, -1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **out) {
    ENTER(NONE);
    if (strncmp(uuid, "GPU-", 4) && strncmp(uuid, "MIG-", 4)) return INVALID_ARGUMENT;
    for (int board = 0; board < (int)lookup("count", 2); board++)
        for (int instance = -1; instance < (int)reading("mig", board, 0); instance++) {
            char known[96];
            uuid_of(device_at(board, instance), known, sizeof known);
            if (!strcmp(known, uuid)) { *out = device_at(board, instance); return enter(__func__, board); }
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *d, char *out, unsigned size) { ENTER(d); uuid_of(d, out, size); return SUCCESS; }

int nvmlDeviceGetName(Device *d, char *out, unsigned size) {
    ENTER(d);
    snprintf(out, size, "Fake Model %llu", reading("model", d->board, 100));
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *d, unsigned *current, unsigned *pending) {
    ENTER(d);
    *current = *pending = reading("mig", d->board, 0) > 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *count) { ENTER(d); *count = MAX_MIG; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **out) {
    ENTER(d);
    if (index >= reading("mig", d->board, 0)) return NOT_FOUND;
    *out = device_at(d->board, index);
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *d, Device **out) {
    ENTER(d);
    *out = device_at(d->board, -1);
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *d, unsigned rates[2]) {
    ENTER(d);
    if (reading("mig", d->board, 0)) return NOT_SUPPORTED; /* instances and their boards alike */
    rates[0] = reading("utilization", d->board, 90);
    rates[1] = 10;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *d, u64 info[3]) { /* total, free, used */
    ENTER(d);
    info[0] = reading("memory_total", d->board, 80ULL << 30) / (d->instance < 0 ? 1 : 4);
    info[2] = reading("memory_used", d->board, 20ULL << 30) / (d->instance < 0 ? 1 : 8);
    info[1] = info[0] - info[2];
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *d, int sensor, unsigned *celsius) {
    (void)sensor;
    ENTER(d);
    BOARD_ONLY(d);
    *celsius = reading("temperature", d->board, 60);
    return SUCCESS;
}

int nvmlDeviceGetTemperatureThreshold(Device *d, int kind, unsigned *celsius) {
    ENTER(d);
    BOARD_ONLY(d);
    if (kind != 1) return INVALID_ARGUMENT; /* NVML_TEMPERATURE_THRESHOLD_SLOWDOWN */
    *celsius = reading("limit", d->board, 92);
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Device *d, unsigned *milliwatts) {
    ENTER(d);
    BOARD_ONLY(d);
    *milliwatts = reading("power", d->board, 250000);
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(Device *d, u64 *millijoules) {
    ENTER(d);
    BOARD_ONLY(d);
    *millijoules = reading("energy", d->board, 9007199254000);
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *d, int type, unsigned *mhz) {
    ENTER(d);
    BOARD_ONLY(d);
    if (type != 1) return INVALID_ARGUMENT; /* NVML_CLOCK_SM */
    *mhz = reading("clock", d->board, 1410);
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, u64 *bits) {
    ENTER(d);
    BOARD_ONLY(d);
    *bits = reading("throttle", d->board, 0x1); /* idle */
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Device *d, int kind, int span, u64 *count) {
    ENTER(d);
    BOARD_ONLY(d);
    if (span != 0) return INVALID_ARGUMENT; /* volatile */
    *count = reading(kind == 0 ? "ecc_corrected" : "ecc_uncorrected", d->board, 0);
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetTemperatureV(Device *d, int info[3]) { /* version, sensor, celsius */
    ENTER(d);
    BOARD_ONLY(d);
    info[2] = reading("temperature", d->board, 60);
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *d, u64 *bits) {
    ENTER(d);
    BOARD_ONLY(d);
    *bits = reading("throttle", d->board, 0x1);
    return SUCCESS;
}
#endif
