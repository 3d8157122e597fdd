/* Helper threads for loops of a hundred microseconds, on cores that other processes use as well.
 *
 * OpenMP waits at the end of a loop for every thread of its team, also for one that has done nothing yet because some
 * other process has its core: a few milliseconds each time, where the whole loop takes a tenth of one. Here whoever
 * calls waits for parts that were begun only, and does all others itself if nobody comes.
 *
 * One call is served at a time; who calls meanwhile works alone. As many threads as torch was told to use take part.
 */
#include "share.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#define MAX_HELPERS 63
#define LOOKS_BEFORE_SLEEP 4000 /* some hundred microseconds: the time between two loops of one step */

/* What is being shared. A ticket is the call's number, then how many parts nobody has taken: so a part is taken, by
 * swapping the ticket, in the call that it was seen in or not at all. */
static struct {
    _Atomic uint64_t ticket;
    _Atomic(part_of_work) work;
    _Atomic(const void *) context;
    _Atomic int64_t num_parts, num_unfinished, num_helpers;
} job;

static atomic_flag is_busy = ATOMIC_FLAG_INIT;
static _Atomic int64_t num_sleeping;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake_up = PTHREAD_COND_INITIALIZER;

static int64_t parts_left(uint64_t ticket) {
    return (int64_t)(ticket & UINT32_MAX);
}

/* Take and do one part; return whether there was one. */
static bool do_part(void) {
    uint64_t ticket = atomic_load(&job.ticket);
    while (parts_left(ticket)) {
        part_of_work work = atomic_load(&job.work);
        const void *context = atomic_load(&job.context);
        int64_t part = atomic_load(&job.num_parts) - parts_left(ticket);
        if (atomic_compare_exchange_weak(&job.ticket, &ticket, ticket - 1)) {
            work(context, part);
            atomic_fetch_sub(&job.num_unfinished, 1);
            return true;
        }
    }
    return false;
}

static bool is_wanted(int64_t helper) {
    return parts_left(atomic_load(&job.ticket)) && helper < atomic_load(&job.num_helpers);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Return when this helper is wanted: soon after, if that is within the next moments. */
static void await_work(int64_t helper) {
    for (int looks = 0; looks < LOOKS_BEFORE_SLEEP; looks++) {
        if (is_wanted(helper))
            return;
        pause_briefly();
    }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&num_sleeping, 1);
    while (!is_wanted(helper))
        pthread_cond_wait(&wake_up, &sleep_lock);
    atomic_fetch_sub(&num_sleeping, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *help(void *index) {
    for (;;) {
        await_work((int64_t)(intptr_t)index);
        while (do_part())
            ;
    }
    return 0;
}

/* Return how many helpers there are, as far as wanted; called by who is_busy serves. */
static int64_t helpers_for(int64_t wanted) {
    static int64_t num_started;
    wanted = wanted < MAX_HELPERS ? wanted : MAX_HELPERS;
    for (pthread_t thread; num_started < wanted; num_started++) {
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)num_started))
            break;
        pthread_detach(thread);
    }
    return num_started < wanted ? num_started : wanted;
}

static void work_alone(part_of_work work, const void *context, int64_t num_parts) {
    for (int64_t part = 0; part < num_parts; part++)
        work(context, part);
}

void share(part_of_work work, const void *context, int64_t num_parts) {
#if defined(_OPENMP)
    int64_t num_threads = omp_get_max_threads();
#else
    int64_t num_threads = 1;
#endif
    if (num_threads < 2 || num_parts < 2 || atomic_flag_test_and_set(&is_busy)) {
        work_alone(work, context, num_parts);
        return;
    }
    atomic_store(&job.work, work);
    atomic_store(&job.context, context);
    atomic_store(&job.num_parts, num_parts);
    atomic_store(&job.num_unfinished, num_parts);
    atomic_store(&job.num_helpers, helpers_for(num_threads - 1));
    uint64_t call = (atomic_load(&job.ticket) >> 32) + 1;
    atomic_store(&job.ticket, call << 32 | (uint64_t)num_parts);
    if (atomic_load(&num_sleeping)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake_up);
        pthread_mutex_unlock(&sleep_lock);
    }
    while (do_part())
        ;
    while (atomic_load(&job.num_unfinished))
        sched_yield(); /* whoever has begun a part may need this core to end it */
    atomic_flag_clear(&is_busy);
}
