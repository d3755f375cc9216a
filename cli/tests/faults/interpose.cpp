// Counts the calls of a process that change files below one folder or bring them to the disk, and lets one of them go
// wrong. Loaded with LD_PRELOAD.
//
// FAULT_ROOT  absolute path of the folder (or a prefix of paths)
// FAULT_LOG   file that gets a line "NUMBER NAME PATH" per call
// FAULT_AT    number of the call that goes wrong, counted from 1
// FAULT_KIND  kill   the process dies before the call
//             tear   it dies after half of a write
//             short  a write writes half of its bytes and says so
//             full   a write writes half of its bytes; from then on there is no space (ENOSPC)
//             NUMBER the call fails with this errno
// FAULT_FOLDERS  errno of every fsync of a folder
// FAULT_LOCKS    errno of every flock
//
// The clock stands still, so that files with speeds in them are the same in each run.

#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

// What is decided about a call.
enum class Fate { Run, Fail, Half };

template <typename F>
F *next(const char *name) {
    return reinterpret_cast<F *>(dlsym(RTLD_NEXT, name));
}
#define NEXT(name) \
    static decltype(::name) *const real = next<decltype(::name)>(#name)

struct Settings {
    const char *root = getenv("FAULT_ROOT");
    const char *kind = getenv("FAULT_KIND");
    long at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
    int log = -1;

    Settings() {
        if (const char *path = getenv("FAULT_LOG"))
            log = next<int(const char *, int, ...)>("open")(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    }
};

Settings &settings() {
    static Settings made;
    return made;
}

long calls = 0;
bool is_full = false;

struct Path {
    char text[8192] = "";

    // The path of an open file.
    explicit Path(int fd) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, text, sizeof text - 1);
        text[length < 0 ? 0 : length] = 0;
    }

    // A path from an open folder on.
    Path(int folder, const char *path) {
        if (path && path[0] == '/') {
            snprintf(text, sizeof text, "%s", path);
        } else if (path) {
            char base[4096] = "";
            if (folder == AT_FDCWD) {
                if (!getcwd(base, sizeof base)) base[0] = 0;
            } else {
                snprintf(base, sizeof base, "%.4095s", Path(folder).text);
            }
            snprintf(text, sizeof text, "%.4000s/%.4000s", base, path);
        }
    }

    explicit Path(const char *path) : Path(AT_FDCWD, path) {}

    bool is_below_root() const {
        const char *root = settings().root;
        return root && strncmp(text, root, strlen(root)) == 0;
    }
};

// Counts a call and decides about it; `needs_space` is what a full disk refuses.
Fate fate(const char *name, const Path &path, bool needs_space, bool writes = false) {
    if (!path.is_below_root()) return Fate::Run;
    Settings &set = settings();
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (set.log >= 0) {
        char line[9000];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, path.text);
        next<ssize_t(int, const void *, size_t)>("write")(set.log, line, size_t(length));
    }
    if (is_full && needs_space) {
        errno = ENOSPC;
        return Fate::Fail;
    }
    if (number != set.at || !set.kind) return Fate::Run;
    if (!strcmp(set.kind, "kill")) {
        raise(SIGKILL);
    } else if (!strcmp(set.kind, "tear") || !strcmp(set.kind, "short")) {
        return writes ? Fate::Half : Fate::Run;
    } else if (!strcmp(set.kind, "full")) {
        is_full = true;
        if (writes) return Fate::Half;
        if (!needs_space) return Fate::Run;
        errno = ENOSPC;
    } else {
        errno = atoi(set.kind);
    }
    return Fate::Fail;
}

// If every such call below the root fails.
bool always(const char *setting, const Path &path) {
    const char *number = getenv(setting);
    if (!number || !path.is_below_root()) return false;
    errno = atoi(number);
    return true;
}

// After half of a write.
template <typename T>
T halved(T result) {
    if (!strcmp(settings().kind, "tear")) raise(SIGKILL);
    return result;
}

// Half of the bytes, at least one.
size_t half(size_t bytes) { return bytes > 1 ? bytes / 2 : bytes; }

bool changes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }

} // namespace

#define CALL(type, name, parameters, path, needs_space, arguments) \
    type name parameters noexcept(noexcept(::name arguments)) { \
        NEXT(name); \
        if (fate(#name, path, needs_space) == Fate::Fail) return -1; \
        return real arguments; \
    }

#define OPEN(name, folder, parameters, ...) \
    int name parameters { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        NEXT(name); \
        if (changes(flags) && fate("open", Path(folder, path), true) == Fate::Fail) return -1; \
        return real(__VA_ARGS__, flags, mode); \
    }

#define WRITE(name, parameters, ...) \
    ssize_t name parameters { \
        NEXT(name); \
        switch (fate("write", Path(fd), true, true)) { \
        case Fate::Fail: return -1; \
        case Fate::Half: return halved(real(fd, bytes, half(count), ##__VA_ARGS__)); \
        default: return real(fd, bytes, count, ##__VA_ARGS__); \
        } \
    }

// Of several buffers half of the first one.
#define WRITE_VECTOR(name, parameters, ...) \
    ssize_t name parameters { \
        NEXT(name); \
        iovec first = count > 0 ? iovec{parts->iov_base, half(parts->iov_len)} : iovec{}; \
        switch (fate("write", Path(fd), true, true)) { \
        case Fate::Fail: return -1; \
        case Fate::Half: return halved(real(fd, &first, count > 0, ##__VA_ARGS__)); \
        default: return real(fd, parts, count, ##__VA_ARGS__); \
        } \
    }

extern "C" {

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN(openat, folder, (int folder, const char *path, int flags, ...), folder, path)
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), folder, path)
CALL(int, creat, (const char *path, mode_t mode), Path(path), true, (path, mode))
CALL(int, creat64, (const char *path, mode_t mode), Path(path), true, (path, mode))

WRITE(write, (int fd, const void *bytes, size_t count))
WRITE(pwrite, (int fd, const void *bytes, size_t count, off_t offset), offset)
WRITE(pwrite64, (int fd, const void *bytes, size_t count, off64_t offset), offset)
WRITE_VECTOR(writev, (int fd, const iovec *parts, int count))
WRITE_VECTOR(pwritev, (int fd, const iovec *parts, int count, off_t offset), offset)
WRITE_VECTOR(pwritev64, (int fd, const iovec *parts, int count, off64_t offset), offset)

ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *at, size_t count, unsigned flags) {
    NEXT(copy_file_range);
    Fate decided = fate("write", Path(fd), true, true);
    if (decided == Fate::Fail) return -1;
    if (decided == Fate::Half) return halved(real(from, start, fd, at, half(count), flags));
    return real(from, start, fd, at, count, flags);
}

ssize_t splice(int from, off64_t *start, int fd, off64_t *at, size_t count, unsigned flags) {
    NEXT(splice);
    Fate decided = fate("write", Path(fd), true, true);
    if (decided == Fate::Fail) return -1;
    if (decided == Fate::Half) return halved(real(from, start, fd, at, half(count), flags));
    return real(from, start, fd, at, count, flags);
}

ssize_t sendfile64(int fd, int from, off64_t *start, size_t count) {
    static auto *const real = next<ssize_t(int, int, off64_t *, size_t)>("sendfile64");
    Fate decided = fate("write", Path(fd), true, true);
    if (decided == Fate::Fail) return -1;
    if (decided == Fate::Half) return halved(real(fd, from, start, half(count)));
    return real(fd, from, start, count);
}

ssize_t sendfile(int fd, int from, off_t *start, size_t count) { return sendfile64(fd, from, start, count); }

CALL(int, truncate, (const char *path, off_t length), Path(path), true, (path, length))
CALL(int, truncate64, (const char *path, off64_t length), Path(path), true, (path, length))
CALL(int, ftruncate, (int fd, off_t length), Path(fd), true, (fd, length))
CALL(int, ftruncate64, (int fd, off64_t length), Path(fd), true, (fd, length))
CALL(int, fallocate, (int fd, int mode, off_t start, off_t length), Path(fd), true, (fd, mode, start, length))
CALL(int, fallocate64, (int fd, int mode, off64_t start, off64_t length), Path(fd), true, (fd, mode, start, length))

int fsync(int fd) {
    NEXT(fsync);
    struct stat found;
    bool is_folder = fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
    if (is_folder && always("FAULT_FOLDERS", Path(fd))) return -1;
    if (fate("fsync", Path(fd), false) == Fate::Fail) return -1;
    return real(fd);
}

CALL(int, fdatasync, (int fd), Path(fd), false, (fd))
CALL(int, syncfs, (int fd), Path(fd), false, (fd))


CALL(int, rename, (const char *from, const char *to), Path(to), false, (from, to))
CALL(int, renameat, (int a, const char *from, int b, const char *to), Path(b, to), false, (a, from, b, to))
CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), Path(b, to), false, (a, from, b, to, flags))
CALL(int, link, (const char *from, const char *to), Path(to), true, (from, to))
CALL(int, linkat, (int a, const char *from, int b, const char *to, int flags), Path(b, to), true, (a, from, b, to, flags))
CALL(int, symlink, (const char *target, const char *path), Path(path), true, (target, path))
CALL(int, symlinkat, (const char *target, int folder, const char *path), Path(folder, path), true, (target, folder, path))
CALL(int, mkdir, (const char *path, mode_t mode), Path(path), true, (path, mode))
CALL(int, mkdirat, (int folder, const char *path, mode_t mode), Path(folder, path), true, (folder, path, mode))
CALL(int, mknod, (const char *path, mode_t mode, dev_t device), Path(path), true, (path, mode, device))
CALL(int, mkfifo, (const char *path, mode_t mode), Path(path), true, (path, mode))
CALL(int, unlink, (const char *path), Path(path), false, (path))
CALL(int, unlinkat, (int folder, const char *path, int flags), Path(folder, path), false, (folder, path, flags))
CALL(int, rmdir, (const char *path), Path(path), false, (path))
CALL(int, remove, (const char *path), Path(path), false, (path))

CALL(int, chmod, (const char *path, mode_t mode), Path(path), false, (path, mode))
CALL(int, fchmod, (int fd, mode_t mode), Path(fd), false, (fd, mode))
CALL(int, fchmodat, (int folder, const char *path, mode_t mode, int flags), Path(folder, path), false, (folder, path, mode, flags))
CALL(int, chown, (const char *path, uid_t user, gid_t group), Path(path), false, (path, user, group))
CALL(int, lchown, (const char *path, uid_t user, gid_t group), Path(path), false, (path, user, group))
CALL(int, fchown, (int fd, uid_t user, gid_t group), Path(fd), false, (fd, user, group))
CALL(int, fchownat, (int folder, const char *path, uid_t user, gid_t group, int flags), Path(folder, path), false, (folder, path, user, group, flags))
CALL(int, futimens, (int fd, const timespec *times), Path(fd), false, (fd, times))
CALL(int, utimensat, (int folder, const char *path, const timespec *times, int flags), Path(folder, path), false, (folder, path, times, flags))

int flock(int fd, int operation) noexcept {
    NEXT(flock);
    if (always("FAULT_LOCKS", Path(fd)) || fate("flock", Path(fd), false) == Fate::Fail) return -1;
    return real(fd, operation);
}

int clock_gettime(clockid_t, timespec *time) noexcept {
    *time = {1'000'000'000, 0};
    return 0;
}

} // extern "C"
