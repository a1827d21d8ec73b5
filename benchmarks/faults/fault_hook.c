/* Preloaded before libc: counts, logs, fails or signals at the k-th change to files below a directory.
 *
 * cc -shared -fPIC -o fault_hook.so fault_hook.c -ldl -lrt
 *
 * Idle until fault_arm() is called (ctypes) or FAULT_HOOK="prefix|contains|ops|first|count|action|number|nanoseconds|logfile"
 * is in the environment. READ, files that are opened to be read, is no change and has to be asked for. Path names of descriptors come from /proc/self/fd.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, TRUNCATE = 64, LINK = 128, READ = 256 };
enum { ONLY_LOG = 0, KILL_BEFORE = 1, FAIL = 2, KILL_IN_HALF = 3, KILL_AFTER = 4, SIGNAL = 5 };

static char prefix[4096], contains[256];
static unsigned wanted;
static long first, count, seen, fired;
static long delay;
static int action, number, log_handle = -1;

void fault_arm(const char *place, const char *with, unsigned ops, long from, long times, int what, int value,
               long nanoseconds, int handle) {
    wanted = 0;
    snprintf(prefix, sizeof prefix, "%s", place);
    snprintf(contains, sizeof contains, "%s", with);
    first = from, count = times, action = what, number = value, delay = nanoseconds, log_handle = handle;
    seen = fired = 0;
    wanted = ops;
}

long fault_seen(void) { return seen; }
long fault_fired(void) { return fired; }

__attribute__((constructor)) static void from_environment(void) {
    char *text = getenv("FAULT_HOOK"), *field[9];
    if (!text || !(text = strdup(text))) return;
    for (int i = 0; i < 9; i++)
        if (!(field[i] = strsep(&text, "|"))) return;
    int handle = open(field[8], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    fault_arm(field[0], field[1], atoi(field[2]), atol(field[3]), atol(field[4]), atoi(field[5]), atoi(field[6]),
              atol(field[7]), handle);
}

static void name_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, 4095);
    out[length < 0 ? 0 : length] = 0;
}

static void join(int directory, const char *path, char *out) {
    if (path[0] == '/' || directory == AT_FDCWD) {
        snprintf(out, 4096, "%s", path);
        return;
    }
    char base[4096];
    name_of(directory, base);
    snprintf(out, 4096, "%.2000s/%.2000s", base, path);
}

static void note(const char *verb, const char *name, const char *path, const char *target) {
    char line[9000];
    if (log_handle < 0) return;
    int length = snprintf(line, sizeof line, "%s %s %s%s%s\n", verb, name, path, *target ? " -> " : "", target);
    syscall(SYS_write, log_handle, line, length);
}

/* A signal to this process, at once or when it has computed for `delay` nanoseconds more. */
static void raise_signal(void) {
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = number};
    struct itimerspec when = {.it_value = {delay / 1000000000, delay % 1000000000}};
    if (!delay || timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timer) || timer_settime(timer, 0, &when, NULL))
        kill(getpid(), number);
}

/* Whether the path is the prefix or below it. */
static int below(const char *path) {
    size_t n = strlen(prefix);
    return !strncmp(path, prefix, n) && (!path[n] || path[n] == '/' || (n && prefix[n - 1] == '/'));
}

/* 0: go on. 1: fail with errno set. 2: write half, then die. 3: die afterwards. */
static int meets(unsigned op, const char *name, const char *path, const char *target) {
    if (!(wanted & op)) return 0;
    if (!below(path) && !below(target)) return 0;
    if (*contains && !strstr(path, contains) && !strstr(target, contains)) return 0;
    long turn = __sync_add_and_fetch(&seen, 1);
    int hit = action != ONLY_LOG && turn >= first && turn < first + count;
    note(hit ? "FIRED" : "did", name, path, target);
    if (!hit) return 0;
    __sync_fetch_and_add(&fired, 1);
    if (action == KILL_BEFORE || (action == KILL_IN_HALF && op != WRITE)) kill(getpid(), SIGKILL);
    if (action == KILL_IN_HALF) return 2;
    if (action == KILL_AFTER) return 3;
    if (action == SIGNAL) {
        raise_signal();
        return 0;
    }
    errno = number;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define DIE_AFTER(call)                                                                                                \
    do {                                                                                                               \
        __typeof__(call) done = call;                                                                                  \
        if (what >= 2) kill(getpid(), SIGKILL);                                                                        \
        return done;                                                                                                   \
    } while (0)

#define ON_DESCRIPTOR(op, type, name, parameters, arguments)                                                           \
    type name parameters {                                                                                             \
        char path[4096] = "";                                                                                          \
        int what = 0;                                                                                                  \
        if (wanted & op) name_of(fd, path), what = meets(op, #name, path, "");                                         \
        if (what == 1) return -1;                                                                                      \
        DIE_AFTER(NEXT(name) arguments);                                                                               \
    }

ssize_t write(int fd, const void *data, size_t size) {
    char path[4096] = "";
    int what = 0;
    if ((wanted & WRITE) && fd != log_handle) name_of(fd, path), what = meets(WRITE, "write", path, "");
    if (what == 1) return -1;
    if (what == 2) size = (size + 1) / 2;
    DIE_AFTER(NEXT(write)(fd, data, size));
}
ON_DESCRIPTOR(WRITE, ssize_t, pwrite, (int fd, const void *d, size_t n, off_t o), (fd, d, n, o))
ON_DESCRIPTOR(WRITE, ssize_t, pwrite64, (int fd, const void *d, size_t n, off64_t o), (fd, d, n, o))
ON_DESCRIPTOR(WRITE, ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_DESCRIPTOR(SYNC, int, fsync, (int fd), (fd))
ON_DESCRIPTOR(SYNC, int, fdatasync, (int fd), (fd))
ON_DESCRIPTOR(TRUNCATE, int, ftruncate, (int fd, off_t n), (fd, n))
ON_DESCRIPTOR(TRUNCATE, int, ftruncate64, (int fd, off64_t n), (fd, n))

#define ON_PATH(op, name, parameters, arguments, directory, given)                                                     \
    int name parameters {                                                                                              \
        char path[4096];                                                                                               \
        int what = 0;                                                                                                  \
        if (wanted & op) join(directory, given, path), what = meets(op, #name, path, "");                              \
        if (what == 1) return -1;                                                                                      \
        DIE_AFTER(NEXT(name) arguments);                                                                               \
    }
ON_PATH(UNLINK, unlink, (const char *p), (p), AT_FDCWD, p)
ON_PATH(UNLINK, unlinkat, (int d, const char *p, int f), (d, p, f), d, p)
ON_PATH(UNLINK, rmdir, (const char *p), (p), AT_FDCWD, p)
ON_PATH(MKDIR, mkdir, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_PATH(MKDIR, mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p)
ON_PATH(TRUNCATE, truncate, (const char *p, off_t n), (p, n), AT_FDCWD, p)
ON_PATH(LINK, symlink, (const char *t, const char *p), (t, p), AT_FDCWD, p)
ON_PATH(LINK, link, (const char *t, const char *p), (t, p), AT_FDCWD, p)

static int moved(const char *name, int from, const char *old, int to, const char *new) {
    char path[4096], target[4096];
    if (!(wanted & RENAME)) return 0;
    join(from, old, path), join(to, new, target);
    return meets(RENAME, name, path, target);
}
int rename(const char *old, const char *new) {
    int what = moved("rename", AT_FDCWD, old, AT_FDCWD, new);
    if (what == 1) return -1;
    DIE_AFTER(NEXT(rename)(old, new));
}
int renameat(int a, const char *old, int b, const char *new) {
    int what = moved("rename", a, old, b, new);
    if (what == 1) return -1;
    DIE_AFTER(NEXT(renameat)(a, old, b, new));
}
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) {
    int what = moved("rename", a, old, b, new);
    if (what == 1) return -1;
    DIE_AFTER(NEXT(renameat2)(a, old, b, new, flags));
}

#define ON_OPEN(name, parameters, directory, call)                                                                     \
    int name parameters {                                                                                              \
        char full[4096];                                                                                               \
        mode_t mode = 0;                                                                                               \
        int what = 0;                                                                                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        int op = flags & (O_CREAT | O_TRUNC) ? OPEN : (flags & O_ACCMODE) == O_RDONLY ? READ : 0;                      \
        if (wanted & op) join(directory, path, full), what = meets(op, op == OPEN ? "open" : "read", full, "");        \
        if (what == 1) return -1;                                                                                      \
        DIE_AFTER(call);                                                                                               \
    }
ON_OPEN(open, (const char *path, int flags, ...), AT_FDCWD, NEXT(open)(path, flags, mode))
ON_OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, NEXT(open64)(path, flags, mode))
ON_OPEN(openat, (int d, const char *path, int flags, ...), d, NEXT(openat)(d, path, flags, mode))
ON_OPEN(openat64, (int d, const char *path, int flags, ...), d, NEXT(openat64)(d, path, flags, mode))
