/* A guest that keeps writing to its memory and its disk, and can tell whether anything of it was lost on the way.
 *
 * A 32-bit multiboot kernel without libc, paging off. It has one loop, which a timer turns each millisecond.
 *
 *     -kernel stress.elf -append "mem=48 ws=16 rate=10 zero=30 disk=1"
 *
 *     mem   MiB up to which memory is filled, from 4 MiB on; at most what the BIOS reports
 *     ws    MiB of working set: the first pages of what is filled
 *     rate  pages of the working set to write each tick
 *     zero  percent of pages that are filled with zeros, the others with what their number says
 *     disk  1: also write, and read back, the first virtio disk
 *
 * Each tick sends the next letter of a..z on COM1, after "<READY>" on a line once memory is filled, and nothing else
 * goes there: what the reader misses is a hole in the alphabet. Ticks that were missed, as nobody ran the guest, are
 * not made up for. A letter that the UART has no place for is sent at a later tick, never left out.
 *
 * Byte 0 of a page of the working set counts how often the page was written, and nothing else of a page ever changes.
 * The pages are written in turn, so the number of whole passes and the next page to be written tell the counter of
 * every page: one that was left behind, or came back older, differs. This also holds for pages of zeros in the working
 * set: they have a counter, too.
 *
 * Commands are single letters on COM1:
 *
 *     v  check every filled page whole; the n-th `v` is answered by the n-th check, one after the other
 *     d  damage: change the last byte of the last filled page
 *     p  power off
 *     r  reset
 *
 * A check is done in the time between two ticks, page by page, so that the heartbeat goes on; what a page ought to hold
 * is asked when its turn comes. Its result, and all else there is to tell, is written to the vitals page, for somebody
 * who maps guest memory. Whoever reads `checks_done` before the result reads the result of that check or a newer one:
 * they are written in the opposite order, and x86 lets others see stores in their order.
 *
 * Sources: Multiboot Specification 0.6.96 (entry state, header, boot information); Virtual I/O Device 1.1, the parts on
 * legacy interfaces; data sheets of the 8254, 8259A, 16550; Intel 82371AB (PIIX4), power management registers.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define MIB (1u << 20)
#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 4)
#define FIRST_PAGE (4 * MIB / PAGE_BYTES) /* all page numbers are those of guest physical memory */

/* The compiler neither moves nor merges memory accesses across it; the processor keeps stores in order by itself. */
#define compiler_barrier() __asm__ volatile("" ::: "memory")

/* -- Ports --------------------------------------------------------------------------------------------------------- */

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u16 in16(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* -- Vitals -------------------------------------------------------------------------------------------------------- */

#define VITALS_GPA 0x3ff000u               /* also in stress.ld and stress.py */
#define VITALS_MAGIC 0x31535254534d4d56ull /* "VMMSTRS1" */
#define NO_PAGE (~0ull)

enum state { FILLING = 1, READY = 2, FAULTED = 3 };

/* Read in this order by stress.py. The halves of a word are stored apart, so values stay below 2^32 (or NO_PAGE). */
struct vitals {
    u64 magic;
    u64 heartbeats; /* letters sent */
    u64 checks_started;
    u64 checks_done;
    u64 bad_pages;      /* in the last check done */
    u64 first_bad_page; /* of the last check done, or NO_PAGE */
    u64 mismatches;     /* counters that were not as predicted when their page was to be written */
    u64 filled_pages;
    u64 passes; /* over the working set */
    u64 state;
    u64 disk_writes;     /* acknowledged by the device */
    u64 disk_read_backs; /* that held what was last written */
    u64 disk_failures;   /* refused by the device, or held something else; 1 if there is no disk */
};

static volatile struct vitals *const vitals = (volatile struct vitals *)VITALS_GPA;

static void begin_vitals(void)
{
    volatile u32 *words = (volatile u32 *)VITALS_GPA;
    for (u32 i = 0; i < PAGE_WORDS; i++) /* the magic first: after a reset, an earlier life stands here */
        words[i] = 0;
    vitals->first_bad_page = NO_PAGE;
    vitals->state = FILLING;
    compiler_barrier();
    vitals->magic = VITALS_MAGIC;
}

/* -- Serial port --------------------------------------------------------------------------------------------------- */

enum { COM1 = 0x3f8, COM1_IER = COM1 + 1, COM1_FCR = COM1 + 2, COM1_LCR = COM1 + 3, COM1_MCR = COM1 + 4 };
enum { COM1_LSR = COM1 + 5, LSR_RECEIVED = 0x01, LSR_THR_EMPTY = 0x20 };

static void begin_serial(void)
{
    out8(COM1_IER, 0);
    out8(COM1_LCR, 0x80); /* the divisor, for 115200 baud, then 8N1 */
    out8(COM1, 1);
    out8(COM1_IER, 0);
    out8(COM1_LCR, 0x03);
    out8(COM1_FCR, 0x07); /* FIFOs on, and empty */
    out8(COM1_MCR, 0x03);
}

/* In FIFO mode an empty THR means that all 16 bytes are free. */
static int serial_has_room(void)
{
    for (int tries = 0; tries < 50; tries++)
        if (in8(COM1_LSR) & LSR_THR_EMPTY)
            return 1;
    return 0;
}

static void say_ready(void)
{
    while (!serial_has_room())
        continue;
    for (const char *at = "<READY>\n"; *at; at++)
        out8(COM1, *at);
}

static void beat(void)
{
    static u32 sent;

    if (!serial_has_room())
        return;
    out8(COM1, 'a' + sent % 26);
    vitals->heartbeats = ++sent;
}

/* -- Memory: what pages ought to hold ------------------------------------------------------------------------------ */

static struct {
    u32 end;         /* first page that is not filled */
    u32 working_set; /* pages */
    u32 rate;        /* pages per tick */
    u32 zero_percent;
    u32 passes;
    u32 next; /* page to be written next */
} memory;

static u32 *page_at(u32 page) { return (u32 *)(page * PAGE_BYTES); }
static u8 *counter_of(u32 page) { return (u8 *)page_at(page); }

/* Scatters numbers that lie close together (the finalizer of MurmurHash3). */
static u32 scattered(u32 number)
{
    number = (number ^ number >> 16) * 0x85ebca6b;
    number = (number ^ number >> 13) * 0xc2b2ae35;
    return number ^ number >> 16;
}

/* Two instructions a word, which under emulation decide how long a check takes; and yet compressors find nothing. */
static inline u32 word_after(u32 word) { return word * 1664525u + 1013904223u; }

static int is_left_zero(u32 page) { return scattered(page ^ 0x5a45524f) % 100 < memory.zero_percent; }

static u8 expected_counter(u32 page)
{
    if (page >= FIRST_PAGE + memory.working_set)
        return 0;
    return (u8)(memory.passes + (page < memory.next));
}

/* Zeros are not written over zeros, so that memory that nobody touched may stay a hole in the host's file. */
static void fill_zero(u32 *words)
{
    for (u32 i = 0; i < PAGE_WORDS; i++)
        if (words[i])
            words[i] = 0;
}

static void fill_random(u32 *words, u32 word)
{
#pragma GCC unroll 8
    for (u32 i = 0; i < PAGE_WORDS; i++)
        words[i] = word = word_after(word);
    *(u8 *)words = 0; /* the counter */
}

static void fill_memory(void)
{
    for (u32 page = FIRST_PAGE; page < memory.end; page++) {
        if (is_left_zero(page))
            fill_zero(page_at(page));
        else
            fill_random(page_at(page), scattered(page));
        vitals->filled_pages = page + 1 - FIRST_PAGE;
    }
}

/* Bits in which the page differs, or-ed together. There is no way out halfway: straight code is what emulators are
 * quick at. */
static u32 difference_from_zero(const u32 *words)
{
    u32 bits = 0;
#pragma GCC unroll 8
    for (u32 i = 0; i < PAGE_WORDS; i++)
        bits |= i ? words[i] : words[i] & ~0xffu;
    return bits;
}

static u32 difference_from_random(const u32 *words, u32 word)
{
    u32 bits = 0;
#pragma GCC unroll 8
    for (u32 i = 0; i < PAGE_WORDS; i++) {
        word = word_after(word);
        bits |= i ? words[i] ^ word : (words[i] ^ word) & ~0xffu;
    }
    return bits;
}

static int page_is_good(u32 page)
{
    const u32 *words = page_at(page);
    if (*counter_of(page) != expected_counter(page))
        return 0;
    return !(is_left_zero(page) ? difference_from_zero(words) : difference_from_random(words, scattered(page)));
}

/* A wrong counter is counted on from what it is, not put right: checks shall find the page, too. */
static void write_working_set(void)
{
    for (u32 written = 0; written < memory.rate; written++) {
        volatile u8 *counter = counter_of(memory.next);
        u8 found = *counter;
        if (found != (u8)memory.passes)
            vitals->mismatches++;
        *counter = found + 1;
        if (++memory.next == FIRST_PAGE + memory.working_set) {
            memory.next = FIRST_PAGE;
            vitals->passes = ++memory.passes;
        }
    }
}

static void damage_last_page(void) { ((u8 *)page_at(memory.end))[-1]++; }

/* -- Checks -------------------------------------------------------------------------------------------------------- */

static struct {
    u32 wanted, started, done;
    u32 page; /* to be checked next */
    u32 bad;
    u64 first_bad;
} check;

enum { CHECK_LEAST_PAGES = 16 }; /* each tick */

static int check_is_due(void) { return check.done != check.wanted; }

static void begin_check(void)
{
    check.page = FIRST_PAGE;
    check.bad = 0;
    check.first_bad = NO_PAGE;
    vitals->checks_started = ++check.started;
}

static void publish_check(void)
{
    vitals->bad_pages = check.bad;
    vitals->first_bad_page = check.first_bad;
    compiler_barrier();
    vitals->checks_done = ++check.done;
}

static void check_one_page(void)
{
    if (check.started == check.done)
        begin_check();
    if (!page_is_good(check.page) && !check.bad++)
        check.first_bad = check.page;
    if (++check.page == memory.end)
        publish_check();
}

/* -- PCI, power ---------------------------------------------------------------------------------------------------- */

enum { PCI_ADDRESS = 0xcf8, PCI_VALUE = 0xcfc };
enum { PCI_ID = 0x00, PCI_COMMAND = 0x04, PCI_BAR0 = 0x10 };
#define PCI_AT(device, function) ((device) << 11 | (function) << 8) /* on bus 0 */

static u32 pci_read(u32 where, u32 offset)
{
    out32(PCI_ADDRESS, 0x80000000 | where | offset);
    return in32(PCI_VALUE);
}

static void pci_write(u32 where, u32 offset, u32 value)
{
    out32(PCI_ADDRESS, 0x80000000 | where | offset);
    out32(PCI_VALUE, value);
}

/* Sleep state S5 is type 0 on both boards' chips, and both have the base of their ports at 0x40. */
static void power_off(void)
{
    static const struct { u32 where, id; } chips[] = {
        {PCI_AT(1, 3), 0x71138086},  /* PIIX4 of i440fx */
        {PCI_AT(31, 0), 0x29188086}, /* ICH9 of q35 */
    };
    enum { BASE = 0x40, PM1_CONTROL = 4, SLEEP_ENABLE = 0x2000 };

    for (u32 i = 0; i < sizeof chips / sizeof *chips; i++)
        if (pci_read(chips[i].where, PCI_ID) == chips[i].id)
            out16((pci_read(chips[i].where, BASE) & 0xff80) + PM1_CONTROL, SLEEP_ENABLE);
}

static void reset(void)
{
    out8(0xcf9, 0x02);
    out8(0xcf9, 0x06); /* both chipsets have this port; on others the keyboard controller resets */
    out8(0x64, 0xfe);
}

/* -- Disk ----------------------------------------------------------------------------------------------------------
 *
 * 256 blocks of a page each, at even distances in the first 64 MiB, are written in turn, each with its number and how
 * often it was written (its generation). A block is read back after it was written, and again before it is written
 * anew: by then, one to two seconds later, host or file may be others. More blocks would take longer to come round, and
 * a write that a move lost would be noticed later.
 *
 * One request at a time. The device is only polled, at ticks: if it never answers, the disk's counters stand still.
 */

enum { DISK_BLOCKS = 256, DISK_TICKS_PER_REQUEST = 2, SECTORS_PER_BLOCK = PAGE_BYTES / 512 };
#define DISK_SPAN_BLOCKS (64 * MIB / PAGE_BYTES)
#define BLOCK_MAGIC 0x424d4d56u /* "VMMB" */

/* Registers of a legacy device from BAR0 on, as long as MSI-X is off. */
enum {
    VIRTIO_FEATURES_WANTED = 0x04,
    VIRTIO_QUEUE_PFN = 0x08,
    VIRTIO_QUEUE_SIZE = 0x0c,
    VIRTIO_QUEUE_SELECT = 0x0e,
    VIRTIO_QUEUE_NOTIFY = 0x10,
    VIRTIO_STATUS = 0x12,
    VIRTIO_BLK_CAPACITY = 0x14, /* in sectors */
};
enum { VIRTIO_ACKNOWLEDGE = 1, VIRTIO_DRIVER = 2, VIRTIO_DRIVER_OK = 4 };
enum { BLK_READ = 0, BLK_WRITE = 1, BLK_OK = 0 };

/* Without it the device takes us for a driver that cannot flush, and flushes after every write. */
#define VIRTIO_BLK_F_FLUSH (1u << 9)

struct descriptor {
    u64 address;
    u32 bytes;
    u16 flags;
    u16 next;
};
enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_DEVICE_WRITES = 2 };

struct available {
    u16 flags;
    u16 index;
    u16 heads[];
};
enum { AVAILABLE_NO_INTERRUPT = 1 };

struct used {
    u16 flags;
    u16 index; /* the elements that follow tell nothing new: there is one request at a time */
};

struct block {
    u32 magic;
    u32 number;
    u32 generation; /* from 1 */
    u32 words[PAGE_WORDS - 3];
};

enum step { CHECK_OLD, WRITE_NEW, READ_BACK };

#define QUEUE_MOST_ENTRIES 1024
static u8 queue_memory[QUEUE_MOST_ENTRIES * 16 + 2 * PAGE_BYTES + QUEUE_MOST_ENTRIES * 8 + PAGE_BYTES]
    __attribute__((aligned(PAGE_BYTES)));

static struct {
    u16 port;
    u16 queue_entries;
    struct descriptor *descriptors;
    volatile struct available *available;
    volatile struct used *used;
    struct { u32 type, reserved; u64 sector; } header;
    struct block block;
    volatile u8 status;

    u32 distance; /* of the blocks that are written; 0 if there is no disk */
    u32 index;    /* of the one that has its turn */
    u32 generations[DISK_BLOCKS];
    enum step step;
    int in_flight;
    u16 completed;
    u32 submitted_at;
} disk;

static u32 find_disk(void)
{
    for (u32 where = 0; where < PCI_AT(32, 0); where += PCI_AT(0, 1))
        if (pci_read(where, PCI_ID) == 0x10011af4)
            return where;
    return 0; /* there the host bridge is */
}

/* Where the parts of a legacy queue lie follows from the size that the device chose. */
static int begin_queue(void)
{
    out16(disk.port + VIRTIO_QUEUE_SELECT, 0);
    u32 entries = in16(disk.port + VIRTIO_QUEUE_SIZE);
    if (entries < 3 || entries > QUEUE_MOST_ENTRIES)
        return 0;
    u32 available = entries * sizeof(struct descriptor);
    u32 used = (available + 6 + 2 * entries + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    disk.queue_entries = entries;
    disk.descriptors = (struct descriptor *)queue_memory;
    disk.available = (volatile struct available *)(queue_memory + available);
    disk.used = (volatile struct used *)(queue_memory + used);
    disk.available->flags = AVAILABLE_NO_INTERRUPT;
    out32(disk.port + VIRTIO_QUEUE_PFN, (u32)queue_memory / PAGE_BYTES);
    return 1;
}

/* Returns whether there is a disk to be used. */
static int begin_disk(void)
{
    enum { IO_SPACE_AND_BUS_MASTER = 0x5 };

    u32 where = find_disk();
    if (!where)
        return 0;
    pci_write(where, PCI_COMMAND, (pci_read(where, PCI_COMMAND) & 0xffff) | IO_SPACE_AND_BUS_MASTER);
    disk.port = pci_read(where, PCI_BAR0) & 0xfffc;
    out8(disk.port + VIRTIO_STATUS, 0);
    out8(disk.port + VIRTIO_STATUS, VIRTIO_ACKNOWLEDGE);
    out8(disk.port + VIRTIO_STATUS, VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER);
    out32(disk.port + VIRTIO_FEATURES_WANTED, VIRTIO_BLK_F_FLUSH);
    if (!begin_queue())
        return 0;
    out8(disk.port + VIRTIO_STATUS, VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER | VIRTIO_DRIVER_OK);

    u64 sectors = in32(disk.port + VIRTIO_BLK_CAPACITY) | (u64)in32(disk.port + VIRTIO_BLK_CAPACITY + 4) << 32;
    u32 blocks = sectors < DISK_SPAN_BLOCKS * SECTORS_PER_BLOCK ? (u32)sectors / SECTORS_PER_BLOCK : DISK_SPAN_BLOCKS;
    disk.distance = blocks / DISK_BLOCKS;
    disk.step = WRITE_NEW;
    return disk.distance != 0;
}

static u32 block_number(void) { return disk.index * disk.distance; }

static void compose_block(u32 generation)
{
    u32 word = scattered(scattered(block_number()) + generation);
    disk.block.magic = BLOCK_MAGIC;
    disk.block.number = block_number();
    disk.block.generation = generation;
    for (u32 i = 0; i < sizeof disk.block.words / 4; i++)
        disk.block.words[i] = word = word_after(word);
}

/* Before it is read: what was written still stands there, and a read that never arrived would pass for a good one. */
static void wipe_block(void)
{
    volatile u32 *words = (volatile u32 *)&disk.block;
    for (u32 i = 0; i < PAGE_WORDS; i++)
        words[i] = 0;
}

static int block_holds(u32 generation)
{
    u32 word = scattered(scattered(block_number()) + generation);
    u32 bits = disk.block.magic ^ BLOCK_MAGIC;
    bits |= disk.block.number ^ block_number();
    bits |= disk.block.generation ^ generation;
    for (u32 i = 0; i < sizeof disk.block.words / 4; i++)
        bits |= disk.block.words[i] ^ (word = word_after(word));
    return !bits;
}

static void submit_request(u32 type)
{
    u16 to_memory = type == BLK_READ ? DESCRIPTOR_DEVICE_WRITES : 0;
    disk.header.type = type;
    disk.header.sector = (u64)block_number() * SECTORS_PER_BLOCK;
    disk.status = 0xff;
    disk.descriptors[0] = (struct descriptor){(u32)&disk.header, sizeof disk.header, DESCRIPTOR_NEXT, 1};
    disk.descriptors[1] = (struct descriptor){(u32)&disk.block, PAGE_BYTES, DESCRIPTOR_NEXT | to_memory, 2};
    disk.descriptors[2] = (struct descriptor){(u32)&disk.status, 1, DESCRIPTOR_DEVICE_WRITES, 0};
    disk.available->heads[disk.completed % disk.queue_entries] = 0;
    compiler_barrier();
    disk.available->index = disk.completed + 1;
    compiler_barrier();
    disk.in_flight = 1;
    out16(disk.port + VIRTIO_QUEUE_NOTIFY, 0);
}

static void next_block(void)
{
    disk.index = (disk.index + 1) % DISK_BLOCKS;
    disk.step = disk.generations[disk.index] ? CHECK_OLD : WRITE_NEW;
}

static void begin_step(void)
{
    if (disk.step == WRITE_NEW) {
        compose_block(disk.generations[disk.index] + 1);
        submit_request(BLK_WRITE);
    } else {
        wipe_block();
        submit_request(BLK_READ);
    }
}

static void end_step(void)
{
    u32 *generation = &disk.generations[disk.index];
    int is_good = disk.status == BLK_OK && (disk.step == WRITE_NEW || block_holds(*generation));

    if (!is_good) {
        vitals->disk_failures++;
    } else if (disk.step == WRITE_NEW) {
        vitals->disk_writes++;
        ++*generation;
    } else {
        vitals->disk_read_backs++;
    }
    if (disk.step == CHECK_OLD)
        disk.step = WRITE_NEW;
    else if (disk.step == WRITE_NEW && is_good)
        disk.step = READ_BACK;
    else
        next_block();
}

static void use_disk(u32 now)
{
    if (!disk.distance)
        return;
    if (disk.in_flight && disk.used->index == (u16)(disk.completed + 1)) {
        compiler_barrier();
        disk.completed++;
        disk.in_flight = 0;
        end_step();
    }
    if (!disk.in_flight && now - disk.submitted_at >= DISK_TICKS_PER_REQUEST) {
        disk.submitted_at = now;
        begin_step();
    }
}

/* -- Interrupts ---------------------------------------------------------------------------------------------------- */

enum { PIC1 = 0x20, PIC2 = 0xa0, PIC_END = 0x20, VECTOR_IRQ0 = 32, VECTOR_IRQ8 = 40, VECTOR_END = 48 };
enum { PIT_CHANNEL0 = 0x40, PIT_CONTROL = 0x43, PIT_HZ = 1193182, TICKS_HZ = 1000 };

struct interrupt_frame;
static volatile u32 ticks;

__attribute__((interrupt)) static void on_tick(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    out8(PIC1, PIC_END);
}

/* All other lines are masked: a spurious one wants no answer. */
__attribute__((interrupt)) static void on_spurious(struct interrupt_frame *frame) { (void)frame; }

__attribute__((interrupt)) static void on_fault(struct interrupt_frame *frame)
{
    (void)frame;
    vitals->state = FAULTED;
    for (;;)
        __asm__ volatile("cli; hlt");
}

struct gate {
    u16 offset_low, selector, type;
    u16 offset_high;
};
enum { CODE_SELECTOR = 0x08, INTERRUPT_GATE = 0x8e00 };
static struct gate gates[VECTOR_END];

static void set_gate(u32 vector, void (*to)(struct interrupt_frame *))
{
    gates[vector] = (struct gate){(u32)to & 0xffff, CODE_SELECTOR, INTERRUPT_GATE, (u32)to >> 16};
}

static void begin_interrupts(void)
{
    static const struct __attribute__((packed)) { u16 limit; void *base; } table = {sizeof gates - 1, gates};

    for (u32 vector = 0; vector < VECTOR_END; vector++)
        set_gate(vector, vector < VECTOR_IRQ0 ? on_fault : vector == VECTOR_IRQ0 ? on_tick : on_spurious);
    __asm__ volatile("lidt %0" ::"m"(table));

    out8(PIC1, 0x11); /* four words each: edge-triggered and cascaded, vectors, where the other one is, 8086 mode */
    out8(PIC2, 0x11);
    out8(PIC1 + 1, VECTOR_IRQ0);
    out8(PIC2 + 1, VECTOR_IRQ8);
    out8(PIC1 + 1, 1 << 2);
    out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1);
    out8(PIC2 + 1, 1);
    out8(PIC1 + 1, 0xfe); /* masks: the timer alone */
    out8(PIC2 + 1, 0xff);
}

static void begin_ticks(void)
{
    enum { DIVISOR = (PIT_HZ + TICKS_HZ / 2) / TICKS_HZ };

    out8(PIT_CONTROL, 0x34); /* channel 0, both bytes, rate generator */
    out8(PIT_CHANNEL0, DIVISOR & 0xff);
    out8(PIT_CHANNEL0, DIVISOR >> 8);
    __asm__ volatile("sti");
}

/* A tick that comes between the comparison and `hlt` would be slept through, but interrupts stay off until `hlt`. */
static void sleep_unless_later(u32 tick)
{
    __asm__ volatile("cli");
    if (ticks == tick)
        __asm__ volatile("sti; hlt");
    else
        __asm__ volatile("sti");
}

/* -- The loop ------------------------------------------------------------------------------------------------------ */

/* A few pages of a due check get their turn at each tick, so that it ends even if other work takes all the time. */
static u32 wait_for_tick(u32 last)
{
    for (u32 pages = 0; check_is_due() && (pages < CHECK_LEAST_PAGES || ticks == last); pages++)
        check_one_page();
    while (ticks == last)
        sleep_unless_later(last);
    return ticks;
}

static void obey(void)
{
    while (in8(COM1_LSR) & LSR_RECEIVED) {
        switch (in8(COM1)) {
        case 'v': check.wanted++; break;
        case 'd': damage_last_page(); break;
        case 'p': power_off(); break;
        case 'r': reset(); break;
        }
    }
}

/* The number behind ` name=`; the first word of the line is the name of the file. */
static u32 option(const char *line, const char *name, u32 otherwise)
{
    for (; *line; line++) {
        if (*line != ' ')
            continue;
        const char *at = line + 1, *want = name;
        while (*want && *at == *want)
            at++, want++;
        if (*want || *at != '=')
            continue;
        u32 number = 0;
        while (*++at >= '0' && *at <= '9')
            number = number * 10 + (u32)(*at - '0');
        return number;
    }
    return otherwise;
}

static u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

struct boot_info {
    u32 flags, lower_kib, upper_kib; /* memory below 640 KiB, and from 1 MiB on */
    u32 device;
    const char *command_line;
};
enum { BOOT_HAS_MEMORY = 1 << 0, BOOT_HAS_COMMAND_LINE = 1 << 2 };

static int configure(const struct boot_info *boot)
{
    const char *line = boot->flags & BOOT_HAS_COMMAND_LINE ? boot->command_line : "";
    u32 mem_mib = smaller(option(line, "mem", 64), 4095);

    memory.end = mem_mib * (MIB / PAGE_BYTES);
    if (boot->flags & BOOT_HAS_MEMORY)
        memory.end = smaller(memory.end, (1024 + boot->upper_kib) / (PAGE_BYTES / 1024));
    if (memory.end <= FIRST_PAGE)
        memory.end = FIRST_PAGE + 1;
    memory.working_set = smaller(smaller(option(line, "ws", 16), 4095) * (MIB / PAGE_BYTES), memory.end - FIRST_PAGE);
    memory.rate = memory.working_set ? option(line, "rate", 0) : 0;
    memory.zero_percent = option(line, "zero", 0);
    memory.next = FIRST_PAGE;
    return option(line, "disk", 0) != 0;
}

__attribute__((used)) static void stress(const struct boot_info *boot)
{
    begin_vitals();
    begin_serial();
    begin_interrupts();
    int wants_disk = configure(boot);
    fill_memory();
    if (wants_disk && !begin_disk())
        vitals->disk_failures = 1;
    vitals->state = READY;
    say_ready();
    begin_ticks();
    for (u32 now = 0;;) {
        now = wait_for_tick(now);
        beat();
        write_working_set();
        use_disk(now);
        obey();
    }
}

/* The loader promises flat segments, but not that they can be loaded again, which interrupts do: hence a table. */
__asm__(".section .multiboot, \"a\"\n"
        ".align 4\n"
        ".long 0x1badb002, 0x00000002, -(0x1badb002 + 0x00000002)\n" /* magic, flags (memory, please), checksum */

        ".section .rodata\n"
        ".align 8\n"
        "segments: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n" /* none, code, data: all of 4 GiB */
        "segments_table: .word 23\n"
        ".long segments\n"

        ".section .bss\n"
        ".align 16\n"
        ".skip 16384\n"
        "stack_top:\n"

        ".text\n"
        ".globl start\n"
        "start:\n"
        "    cli\n"
        "    cld\n"
        "    lgdt segments_table\n"
        "    ljmp $0x08, $1f\n"
        "1:  mov $0x10, %eax\n"
        "    mov %eax, %ds\n"
        "    mov %eax, %es\n"
        "    mov %eax, %fs\n"
        "    mov %eax, %gs\n"
        "    mov %eax, %ss\n"
        "    mov $stack_top, %esp\n"
        "    push %ebx\n" /* where the boot information is */
        "    call stress\n");
