/*
 * The tracker: loaded into a QEMU before it starts (LD_PRELOAD), it has the kernel note which pages of guest RAM are
 * written. It does nothing else, and nothing at all unless VMMIGRATE_RAM names the file that holds guest RAM, as
 * "DEVICE:INODE" in decimal.
 *
 * When QEMU maps that file, shared, the mapping is registered with a userfaultfd in asynchronous write-protect mode. In
 * that mode the kernel resolves every fault by itself and sends no message, so nobody has to read the descriptor; it is
 * kept open because the registration lives as long as it does. Another process then asks PAGEMAP_SCAN which pages were
 * written. If anything here fails, QEMU runs on without tracking, and that scan says so.
 *
 * Only writes through this process' own mapping leave marks: another process that maps the file writes unseen.
 *
 * Source: linux/userfaultfd.h, Linux 6.7 and later.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Headers may be older than the kernel that runs. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define WP_FEATURES ((1 << 0) | (1 << 12) | (1 << 13) | (1 << 15)) /* faults, shared memory, unpopulated, async */

static int is_guest_ram(int fd)
{
    const char *wanted = getenv("VMMIGRATE_RAM");
    unsigned long long device, inode;
    struct stat file;
    return wanted && sscanf(wanted, "%llu:%llu", &device, &inode) == 2 && fstat(fd, &file) == 0 &&
           file.st_dev == device && file.st_ino == inode;
}

static void track(void *start, size_t size)
{
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = WP_FEATURES};
    struct uffdio_register range = {.range = {(unsigned long)start, size}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (uffd < 0)
        perror("vmmigrate tracker: userfaultfd");
    else if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range)) {
        perror("vmmigrate tracker: registering guest RAM");
        close(uffd);
    }
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "mmap");
    void *mapped = real(address, size, protection, flags, fd, offset);
    if (mapped != MAP_FAILED && fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && is_guest_ram(fd))
        track(mapped, size);
    return mapped;
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));
