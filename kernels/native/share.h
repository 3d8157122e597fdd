/* Work in parts, shared with helper threads: for the short loops of a decode step. See share.c. */
#ifndef SHARE_H
#define SHARE_H

#include <stdint.h>

typedef void (*part_of_work)(const void *context, int64_t part);

/* Run work(context, part) for every part from 0 to num_parts - 1, each once, on any thread; return when all are done. */
void share(part_of_work work, const void *context, int64_t num_parts);

#endif
