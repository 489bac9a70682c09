/* Fault injection for file operations below a folder: an LD_PRELOAD library for Linux.

   fault_arm(root, n, action) starts counting the file operations below `root` and selects the fault at
   operation n, counted from 1. With n = 0, operations are only counted. If `action` is -1, the process is
   killed; a write is half done before. If `action` is an errno, the operation fails with it. After ENOSPC,
   every later operation that allocates space also fails, as on a full disk. The operation with the fault and
   its path are printed to standard error. fault_count() returns the number of operations so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FD 4096
static char root[PATH_MAX];
static size_t root_length;
static atomic_int count, target, action, tracked[MAX_FD];

void fault_arm(const char *path, int n, int act) {
    strncpy(root, path, sizeof root - 1);
    root_length = strlen(root);
    count = 0;
    target = n;
    action = act;
}
int fault_count(void) { return count; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

static int below(int folder, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (!root_length || !path) return 0;
    if (path[0] != '/') {
        ssize_t n;
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        n = readlink(link, full, PATH_MAX);
        if (n < 0) return 0;
        snprintf(full + n, sizeof full - n, "/%s", path);
        path = full;
    }
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

/* Counts an operation. If it must fail, sets errno and returns 1. */
static int strike(int allocates, const char *name, const char *path, int fd) {
    int n = ++count;
    char link[64], target_path[PATH_MAX];
    if (!target || n < target) return 0;
    if (n == target) {
        if (!path) {
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            ssize_t length = readlink(link, target_path, sizeof target_path - 1);
            target_path[length < 0 ? 0 : length] = 0;
            path = target_path;
        }
        dprintf(2, "fault at %s of %s\n", name, path);
    }
    if (n == target && action < 0) kill(getpid(), SIGKILL);
    if (action > 0 && (n == target || (action == ENOSPC && allocates))) { errno = action; return 1; }
    return 0;
}
static void track(int fd, int on) { if (fd >= 0 && fd < MAX_FD) tracked[fd] = on; }
static int is_tracked(int fd) { return fd >= 0 && fd < MAX_FD && tracked[fd]; }
static int must_kill(void) { return count + 1 == target && action < 0; }

static int open_any(int folder, const char *path, int flags, mode_t mode) {
    REAL(int, "openat", int, const char *, int, ...)
    int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(folder, path), fd;
    if (writes && strike(flags & O_CREAT, "open", path, -1)) return -1;
    fd = real(folder, path, flags, mode);
    track(fd, writes);
    return fd;
}
#define MODE va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list);
int open(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_any(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_any(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
#define FOPEN(name) FILE *name(const char *path, const char *how) { \
    REAL(FILE *, #name, const char *, const char *) \
    int writes = strpbrk(how, "wa+") && below(AT_FDCWD, path); \
    if (writes && strike(1, #name, path, -1)) return NULL; \
    FILE *file = real(path, how); if (file) track(fileno(file), writes); return file; }
FOPEN(fopen)
FOPEN(fopen64)
int close(int fd) { REAL(int, "close", int) track(fd, 0); return real(fd); }
int fclose(FILE *file) { REAL(int, "fclose", FILE *) track(fileno(file), 0); return real(file); }
int dup(int fd) { REAL(int, "dup", int) int copy = real(fd); track(copy, is_tracked(fd)); return copy; }
static int fcntl_any(int fd, int command, void *argument) {
    REAL(int, "fcntl64", int, int, ...)
    int result = real(fd, command, argument);
    if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) track(result, is_tracked(fd));
    return result;
}
#define ARGUMENT va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
int fcntl(int fd, int command, ...) { ARGUMENT return fcntl_any(fd, command, argument); }
int fcntl64(int fd, int command, ...) { ARGUMENT return fcntl_any(fd, command, argument); }

/* Before the process is killed at a write, the first half of the data is written. */
ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t)
    if (is_tracked(fd)) {
        if (must_kill() && size > 1) real(fd, data, size / 2);
        if (strike(1, "write", NULL, fd)) return -1;
    }
    return real(fd, data, size);
}
#define PWRITE(name, offset_type) ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
    REAL(ssize_t, #name, int, const void *, size_t, offset_type) \
    if (is_tracked(fd)) { \
        if (must_kill() && size > 1) real(fd, data, size / 2, offset); \
        if (strike(1, #name, NULL, fd)) return -1; } \
    return real(fd, data, size, offset); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int)
    if (is_tracked(fd)) {
        if (must_kill() && n > 1) real(fd, parts, n / 2);
        if (strike(1, "writev", NULL, fd)) return -1;
    }
    return real(fd, parts, n);
}
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *)
    if (is_tracked(fileno(file))) {
        if (must_kill() && n > 1) { real(data, size, n / 2, file); fflush(file); }
        if (strike(1, "fwrite", NULL, fileno(file))) return 0;
    }
    return real(data, size, n, file);
}
#define SENDFILE(name, offset_type) ssize_t name(int to, int from, offset_type *offset, size_t size) { \
    REAL(ssize_t, #name, int, int, offset_type *, size_t) \
    if (is_tracked(to)) { \
        if (must_kill() && size > 1) real(to, from, offset, size / 2); \
        if (strike(1, #name, NULL, to)) return -1; } \
    return real(to, from, offset, size); }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned)
    if (is_tracked(to) && strike(1, "copy_file_range", NULL, to)) return -1;
    return real(from, at, to, to_at, size, flags);
}
#define ON_FD(name, allocates) int name(int fd) { REAL(int, #name, int) \
    if (is_tracked(fd) && strike(allocates, #name, NULL, fd)) { return -1; } return real(fd); }
ON_FD(fsync, 0)
ON_FD(fdatasync, 0)
#define TRUNCATE(name, type) int name(int fd, type size) { REAL(int, #name, int, type) \
    if (is_tracked(fd) && strike(1, #name, NULL, fd)) { return -1; } return real(fd, size); }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ON_PATH(name, allocates) int name(const char *path) { REAL(int, #name, const char *) \
    if (below(AT_FDCWD, path) && strike(allocates, #name, path, -1)) { return -1; } return real(path); }
ON_PATH(unlink, 0)
ON_PATH(rmdir, 0)
ON_PATH(remove, 0)
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int)
    if (below(folder, path) && strike(0, "unlinkat", path, -1)) return -1;
    return real(folder, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t)
    if (below(AT_FDCWD, path) && strike(1, "mkdir", path, -1)) return -1;
    return real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *)
    if (below(AT_FDCWD, to) && strike(0, "rename", to, -1)) return -1;
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *)
    if (below(b, to) && strike(0, "renameat", to, -1)) return -1;
    return real(a, from, b, to);
}
