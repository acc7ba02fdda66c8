/* A minimal exchange over a medium between two processes, with which Lamina's transports are compared.
 *
 *     pingpong MEDIUM NEAR_CPU FAR_CPU      (-1 does not pin)
 *
 * MEDIUM is one of
 *     tcp       blocking sockets over loopback, TCP_NODELAY
 *     eventfd   memcpy into memory that both processes map, and an eventfd on which the other end waits
 *     polling   the same with a counter in place of the eventfd, which the other end polls
 *     memcpy    memcpy into such memory without a signal to the other end; no round_trip
 *
 * Each line of standard input asks for a measurement, each line of standard output answers one:
 *     round_trip SIZE SLOTS DEPTH SECONDS   SIZE bytes there and as many back; ignores SLOTS and DEPTH
 *     bandwidth SIZE SLOTS DEPTH SECONDS    SIZE bytes there, DEPTH times before waiting for an answer of one byte,
 *                                           from one SLOT after the other into one after the other
 *     {"p50_us": ..., "p99_us": ..., "gbps": ...}   of a round trip or write; in 10^9 bytes per second
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_SPAN ((size_t)64 << 20) /* SLOTS of SIZE */
#define MAX_DEPTH 1024
#define MAX_TIMES (1 << 22)
#define ANSWER_BYTES 1

enum medium { TCP, EVENTFD, POLLING, MEMCPY };
static const char *const media[] = {"tcp", "eventfd", "polling", "memcpy"};
enum phase { ROUND_TRIP, BANDWIDTH };
enum end { NEAR, FAR };

/* What both ends do next, as the near end says. */
struct batch {
    enum phase phase;
    size_t size, slots, depth, count;
};

struct counter {
    uint64_t value;
    char rest_of_cache_lines[120];
};

static enum medium medium;
static enum end end;             /* which this process is */
static int data;                 /* tcp: the socket */
static int bells[2];             /* eventfd: the one that wakes this end */
static struct counter *counters; /* polling: what was sent to this end */
static uint64_t taken;           /* polling: how much of it this end has seen */
static char *targets[2];         /* what is written to this end, mapped by both */
static char *source;
static double times[MAX_TIMES];
static size_t n_times;

static void die(const char *what) {
    fprintf(stderr, "pingpong: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *memory(size_t size) {
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    return p;
}

static void send_all(int fd, const char *from, size_t size) {
    while (size) {
        ssize_t n = send(fd, from, size, MSG_NOSIGNAL);
        if (n <= 0) die("send");
        from += n;
        size -= (size_t)n;
    }
}

/* False at the end of the connection. */
static int receive_all(int fd, char *to, size_t size) {
    while (size) {
        ssize_t n = recv(fd, to, size, MSG_WAITALL);
        if (n < 0) die("recv");
        if (n == 0) return 0;
        to += n;
        size -= (size_t)n;
    }
    return 1;
}

/* To the other end. */
static void put(size_t slot, size_t size) {
    const enum end other = end == NEAR ? FAR : NEAR;
    const char *from = source + slot * size;
    if (medium == TCP) {
        send_all(data, from, size);
        return;
    }
    memcpy(targets[other] + slot * size, from, size);
    if (medium == EVENTFD && eventfd_write(bells[other], 1)) die("eventfd_write");
    if (medium == POLLING) __atomic_fetch_add(&counters[other].value, 1, __ATOMIC_RELEASE);
}

/* Wait for at least one, of `size` bytes; returns how many have come. */
static size_t take(size_t slot, size_t size) {
    if (medium == TCP) {
        if (!receive_all(data, targets[end] + slot * size, size)) exit(0);
        return 1;
    }
    if (medium == EVENTFD) {
        eventfd_t rung;
        if (eventfd_read(bells[end], &rung)) die("eventfd_read");
        return rung;
    }
    uint64_t value;
    while ((value = __atomic_load_n(&counters[end].value, __ATOMIC_ACQUIRE)) == taken) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    const uint64_t came = value - taken;
    taken = value;
    return came;
}

static void note(double seconds) {
    if (n_times < MAX_TIMES) times[n_times++] = seconds;
}

static void near_batch(const struct batch *b) {
    double started[MAX_DEPTH];
    if (medium == MEMCPY) {
        for (size_t i = 0; i < b->count; i++) {
            const double before = now();
            put(i % b->slots, b->size);
            note(now() - before);
        }
    } else if (b->phase == ROUND_TRIP) {
        for (size_t i = 0; i < b->count; i++) {
            const double before = now();
            put(0, b->size);
            take(0, b->size);
            note(now() - before);
        }
    } else {
        for (size_t sent = 0, answered = 0; answered < b->count;) {
            for (; sent < b->count && sent - answered < b->depth; sent++) {
                started[sent % b->depth] = now();
                put(sent % b->slots, b->size);
            }
            for (size_t came = take(0, ANSWER_BYTES); came; came--, answered++)
                note(now() - started[answered % b->depth]);
        }
    }
}

static void far_batch(const struct batch *b) {
    for (size_t done = 0; done < b->count;) {
        const size_t came = take(b->phase == BANDWIDTH ? done % b->slots : 0, b->size);
        for (size_t i = 0; i < came; i++) put(0, b->phase == BANDWIDTH ? ANSWER_BYTES : b->size);
        done += came;
    }
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds that a batch takes. */
static double run(int control, const struct batch *b) {
    if (medium != MEMCPY) send_all(control, (const char *)b, sizeof *b);
    const double before = now();
    near_batch(b);
    return now() - before;
}

static void measure(int control, struct batch b, double seconds) {
    b.count = 2 * b.slots + 16;
    double took = run(control, &b); /* touches all memory; its time does not count */
    double total = 0, bytes = 0;
    n_times = 0;
    do {
        const double fitting = (double)b.count * seconds / 4 / took;
        b.count = fitting < 4 ? 4 : fitting > MAX_TIMES / 16 ? MAX_TIMES / 16 : (size_t)fitting;
        took = run(control, &b);
        total += took;
        bytes += (double)b.count * (double)b.size;
    } while (total < seconds);
    qsort(times, n_times, sizeof *times, compare);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"gbps\": %.6f}\n", times[n_times / 2] * 1e6,
           times[n_times - 1 - n_times / 100] * 1e6, bytes / total * 1e-9);
    fflush(stdout);
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set)) die("sched_setaffinity");
}

static void connect_ends(int connected[2]) {
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof place;
    const int listening = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    connected[NEAR] = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listening, (struct sockaddr *)&place, length) || listen(listening, 1) ||
        getsockname(listening, (struct sockaddr *)&place, &length) ||
        connect(connected[NEAR], (struct sockaddr *)&place, length) ||
        (connected[FAR] = accept(listening, NULL, NULL)) < 0)
        die("cannot connect over loopback");
    for (int i = 0; i < 2; i++) setsockopt(connected[i], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    close(listening);
}

int main(int argc, char **argv) {
    for (medium = TCP; medium <= MEMCPY && (argc != 4 || strcmp(argv[1], media[medium])); medium++) continue;
    if (medium > MEMCPY) {
        fprintf(stderr, "usage: pingpong tcp|eventfd|polling|memcpy NEAR_CPU FAR_CPU\n");
        return 2;
    }
    int control[2], connected[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, control)) die("socketpair");
    connect_ends(connected);
    counters = memory(2 * sizeof *counters);
    for (int i = 0; i < 2; i++) {
        targets[i] = memory(MAX_SPAN);
        if ((bells[i] = eventfd(0, 0)) < 0) die("eventfd");
    }
    const pid_t child = fork();
    if (child < 0) die("fork");
    end = child ? NEAR : FAR;
    data = connected[end];
    close(connected[end == NEAR ? FAR : NEAR]);
    close(control[end == NEAR ? FAR : NEAR]);
    source = memory(MAX_SPAN);
    pin(atoi(argv[2 + end]));
    if (end == FAR) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        struct batch b;
        while (receive_all(control[FAR], (char *)&b, sizeof b)) far_batch(&b);
        return 0;
    }
    char phase[16];
    struct batch b;
    double seconds;
    while (scanf("%15s %zu %zu %zu %lf", phase, &b.size, &b.slots, &b.depth, &seconds) == 5) {
        b.phase = strcmp(phase, "round_trip") ? BANDWIDTH : ROUND_TRIP;
        if (!b.size || !b.slots || b.size * b.slots > MAX_SPAN || !b.depth || b.depth > MAX_DEPTH) {
            fprintf(stderr, "pingpong: sizes and depth must be 1 or more, SIZE * SLOTS at most %zu, DEPTH at most %d\n",
                    MAX_SPAN, MAX_DEPTH);
            return 2;
        }
        measure(control[NEAR], b, seconds);
    }
    return 0;
}
