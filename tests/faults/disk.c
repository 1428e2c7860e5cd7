/* Preloaded into a training by tests/disk.py: what it does to the disk is written down, and fails when told to.
 *
 * DISK_ROOT=/folder    only what lies in there counts
 * DISK_LOG=/file       takes one record for every call that changed something there, when it had returned;
 *                      tests/faults/power.py reads it and builds what a power cut could have left
 * disk_fault(call, part, skip, times, error)
 *                      the calls of this name ("write", "fsync", "open", "rename", "mkdir", "unlink"; "change" for
 *                      any of them) on paths that contain `part`, or end in it if it ends in $, fail with errno `error`, after the first `skip`,
 *                      `times` times; error 0: only half of what was to be written is;
 *                      error -500: they come half a second late, and do not fail
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The names with 64 are the same functions on 64-bit Linux; without this, the header would rename ours. */
#undef open64
#undef openat64

static char root[PATH_MAX];
static int log_fd = -1;

static struct { char call[16], part[256]; int skip, times, error; } fault;
static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ({ static typeof(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("DISK_ROOT"), *file = getenv("DISK_LOG");
    if (!folder || !realpath(folder, root)) root[0] = 0;
    if (root[0] && file) {
        int fd = REAL(open)(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 700); /* out of the way of programs that close what they know */
        close(fd);
    }
}

void disk_fault(const char *call, const char *part, int skip, int times, int error) {
    pthread_mutex_lock(&fault_lock);
    snprintf(fault.call, sizeof fault.call, "%s", call);
    snprintf(fault.part, sizeof fault.part, "%s", part);
    fault.skip = skip, fault.times = times, fault.error = error;
    pthread_mutex_unlock(&fault_lock);
}

static int is_meant(const char *path) {
    size_t n = strlen(fault.part), m = strlen(path);
    if (!n || fault.part[n - 1] != '$') return strstr(path, fault.part) != NULL;
    return m >= n - 1 && !strncmp(path + m - (n - 1), fault.part, n - 1);
}

/* Whether this call is to fail; errno says how, 0 for a short write. */
static int fails(const char *call, const char *path) {
    int found = 0;
    if (!path || !fault.times) return 0;
    pthread_mutex_lock(&fault_lock);
    if (fault.times && (!strcmp(fault.call, call) || !strcmp(fault.call, "change")) && is_meant(path)) {
        if (fault.skip) fault.skip--;
        else { fault.times--; found = 1; errno = fault.error; }
    }
    int late = found && fault.error < 0 ? -fault.error : 0;
    pthread_mutex_unlock(&fault_lock);
    if (late) usleep(late * 1000);
    return found && !late;
}

static int inside(const char *path) {
    size_t n = strlen(root);
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

/* The path of an open file, NULL where it is none of ours. */
static const char *of_fd(int fd, char *path) {
    char link[32];
    int saved = errno;
    if (!root[0]) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    errno = saved;
    if (n <= 0) return NULL;
    path[n] = 0;
    return inside(path) ? path : NULL;
}

/* The absolute path of a name in a folder, NULL where it is none of ours; links are not followed. */
static const char *of_name(int dir, const char *name, char *path) {
    char base[PATH_MAX];
    if (!root[0] || !name) return NULL;
    if (name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return NULL; }
        else if (!of_fd(dir, base)) return NULL;
        size_t n = strlen(base), m = strlen(name);
        if (n + m + 2 > PATH_MAX) return NULL;
        memcpy(path, base, n), path[n] = '/', memcpy(path + n + 1, name, m + 1);
    }
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') path[--n] = 0;
    return inside(path) ? path : NULL;
}

struct record { char kind; char pad[7]; uint64_t inode; int64_t a, b; uint32_t first, second; } __attribute__((packed));

static void note(char kind, uint64_t inode, int64_t a, int64_t b, const char *path, const void *data, size_t size) {
    int saved = errno;
    if (log_fd < 0) return;
    struct record head = {kind, "", inode, a, b, path ? strlen(path) : 0, size};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)path, head.first}, {(void *)data, size}};
    if (REAL(writev)(log_fd, parts, 3) != (ssize_t)(sizeof head + head.first + size)) abort(); /* a torn log proves nothing */
    errno = saved;
}

static uint64_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

/* ---- open */

static int opened(int fd, const char *path, int flags) {
    if (fd >= 0 && path && (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE)
        note('O', inode_of(fd), !!(flags & O_TRUNC), 0, path, NULL, 0);
    return fd;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) int name(const char *name_, int flags, ...) { \
    MODE char at[PATH_MAX]; const char *path = of_name(AT_FDCWD, name_, at); \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path)) return -1; \
    return opened(REAL(name)(name_, flags, mode), path, flags); }
#define OPENAT(name) int name(int dir, const char *name_, int flags, ...) { \
    MODE char at[PATH_MAX]; const char *path = of_name(dir, name_, at); \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path)) return -1; \
    return opened(REAL(name)(dir, name_, flags, mode), path, flags); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *name_, const char *how) { \
    char at[PATH_MAX]; const char *path = of_name(AT_FDCWD, name_, at); \
    if (how[0] != 'r' && fails("open", path)) return NULL; \
    FILE *file = REAL(name)(name_, how); \
    if (file && how[0] != 'r') opened(fileno(file), path, O_CREAT | (how[0] == 'w' ? O_TRUNC : 0)); \
    return file; }
FOPEN(fopen)
FOPEN(fopen64)

/* ---- data */

static ssize_t written(int fd, const char *path, ssize_t n, off_t at, const void *data) {
    if (n > 0 && path) note('W', inode_of(fd), at < 0 ? lseek(fd, 0, SEEK_CUR) - n : at, 0, NULL, data, n);
    return n;
}

ssize_t write(int fd, const void *data, size_t size) {
    char at[PATH_MAX];
    const char *path = of_fd(fd, at);
    if (fails("write", path)) { if (errno) return -1; if (size > 1) size /= 2; }
    return written(fd, path, REAL(write)(fd, data, size), -1, data);
}

#define PWRITE(name) ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("write", path)) { if (errno) return -1; if (size > 1) size /= 2; } \
    return written(fd, path, REAL(name)(fd, data, size, offset), offset, data); }
PWRITE(pwrite)
PWRITE(pwrite64)

static ssize_t all_written(int fd, const char *path, ssize_t n, off_t at, const struct iovec *parts, int count) {
    if (n <= 0 || !path) return n;
    off_t from = at < 0 ? lseek(fd, 0, SEEK_CUR) - n : at;
    size_t left = n;
    for (int i = 0; i < count && left; i++) {
        size_t here = parts[i].iov_len < left ? parts[i].iov_len : left;
        if (here) note('W', inode_of(fd), from, 0, NULL, parts[i].iov_base, here);
        from += here, left -= here;
    }
    return n;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char at[PATH_MAX];
    const char *path = of_fd(fd, at);
    if (fails("write", path)) { if (errno) return -1; if (parts->iov_len) count = 1; }
    return all_written(fd, path, REAL(writev)(fd, parts, count), -1, parts, count);
}

#define PWRITEV(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("write", path)) { if (errno) return -1; if (parts->iov_len) count = 1; } \
    return all_written(fd, path, REAL(name)(fd, parts, count, offset), offset, parts, count); }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define FTRUNCATE(name) int name(int fd, off_t size) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("truncate", path)) return -1; \
    int n = REAL(name)(fd, size); \
    if (!n && path) note('T', inode_of(fd), size, 0, NULL, NULL, 0); \
    return n; }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

#define TRUNCATE(name) int name(const char *name_, off_t size) { \
    char at[PATH_MAX]; const char *path = of_name(AT_FDCWD, name_, at); struct stat found; \
    if (fails("truncate", path)) return -1; \
    int n = REAL(name)(name_, size); \
    if (!n && path && !stat(path, &found)) note('T', found.st_ino, size, 0, NULL, NULL, 0); \
    return n; }
TRUNCATE(truncate)
TRUNCATE(truncate64)

#define FALLOCATE(name) int name(int fd, int mode, off_t from, off_t size) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("write", path) && errno) return -1; \
    int n = REAL(name)(fd, mode, from, size); \
    if (!n && path && !mode) note('A', inode_of(fd), from, size, NULL, NULL, 0); \
    return n; }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)

#define POSIX_FALLOCATE(name) int name(int fd, off_t from, off_t size) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("write", path) && errno) return errno; \
    int n = REAL(name)(fd, from, size); \
    if (!n && path) note('A', inode_of(fd), from, size, NULL, NULL, 0); \
    return n; }
POSIX_FALLOCATE(posix_fallocate)
POSIX_FALLOCATE(posix_fallocate64)

#define FSYNC(name) int name(int fd) { \
    char at[PATH_MAX]; const char *path = of_fd(fd, at); \
    if (fails("fsync", path)) return -1; \
    int n = REAL(name)(fd); \
    if (!n && path) note('S', inode_of(fd), 0, 0, path, NULL, 0); \
    return n; }
FSYNC(fsync)
FSYNC(fdatasync)

/* ---- names */

static int renamed(int n, const char *from, const char *to) {
    if (!n && from && to) note('R', 0, 0, 0, from, to, strlen(to));
    return n;
}

int rename(const char *old, const char *new) {
    char a[PATH_MAX], b[PATH_MAX];
    const char *from = of_name(AT_FDCWD, old, a), *to = of_name(AT_FDCWD, new, b);
    if (fails("rename", from)) return -1;
    return renamed(REAL(rename)(old, new), from, to);
}

int renameat(int olddir, const char *old, int newdir, const char *new) {
    char a[PATH_MAX], b[PATH_MAX];
    const char *from = of_name(olddir, old, a), *to = of_name(newdir, new, b);
    if (fails("rename", from)) return -1;
    return renamed(REAL(renameat)(olddir, old, newdir, new), from, to);
}

int unlinkat(int dir, const char *name, int flags) {
    char at[PATH_MAX];
    const char *path = of_name(dir, name, at);
    if (fails("unlink", path)) return -1;
    int n = REAL(unlinkat)(dir, name, flags);
    if (!n && path) note('U', 0, 0, 0, path, NULL, 0);
    return n;
}

#define REMOVE(name) int name(const char *name_) { \
    char at[PATH_MAX]; const char *path = of_name(AT_FDCWD, name_, at); \
    if (fails("unlink", path)) return -1; \
    int n = REAL(name)(name_); \
    if (!n && path) note('U', 0, 0, 0, path, NULL, 0); \
    return n; }
REMOVE(unlink)
REMOVE(rmdir)

int mkdirat(int dir, const char *name, mode_t mode) {
    char at[PATH_MAX];
    struct stat found;
    const char *path = of_name(dir, name, at);
    if (fails("mkdir", path)) return -1;
    int n = REAL(mkdirat)(dir, name, mode);
    if (!n && path && !stat(path, &found)) note('M', found.st_ino, 0, 0, path, NULL, 0);
    return n;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
