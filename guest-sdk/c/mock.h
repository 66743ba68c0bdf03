/*
 * A host in memory, to run a provider natively: disks, an archive and the rules of the contract, in milliseconds.
 *
 * For a provider's own tests: `make test`, which compiles them, the provider and mock.c with the machine's own compiler.
 * What it checks is what the host checks first of all: ranges, coverage, and that what was claimed is given back, by an
 * image that is opened anew. It is no sandbox: statics outlive an instance here, all of the C library works, and only
 * one volume is backed up at a time. `fleecebox provider test` is the judge of the component.
 *
 *     #include "mock.h"
 *
 *     int main(void)
 *     {
 *         fleecebox_mock_disk *disk = fleecebox_mock_disk_new("scsi0", 1000001);
 *         fleecebox_mock_write(disk, 500000, "something", 9);
 *         const fleecebox_mock_backup *full = fleecebox_mock_back_up(disk);
 *         if (full->failure != FLEECEBOX_MOCK_NONE)
 *             return fprintf(stderr, "%s\n", full->why), 1;
 *         assert(memcmp(full->restored, fleecebox_mock_bytes(disk), 1000001) == 0);
 *         fleecebox_mock_disk_free(disk);
 *     }
 *
 * A handle that is used after it ended, as an object after fleecebox_finish, would trap in the sandbox; here it aborts,
 * and says so. So does memory that runs out.
 */
#ifndef FLEECEBOX_MOCK_H
#define FLEECEBOX_MOCK_H

#include "fleecebox-guest.h"

/* A disk that changes and is backed up: the first time in full, then only what changed since the last good backup. */
typedef struct fleecebox_mock_disk fleecebox_mock_disk;

/* Why there is no backup. */
typedef enum {
    /* There is one. */
    FLEECEBOX_MOCK_NONE,
    /* `run` returned `error`. */
    FLEECEBOX_MOCK_GAVE_UP,
    /* `run` succeeded without having covered `range`, the first of those missing. */
    FLEECEBOX_MOCK_UNCOVERED,
    /* An object was neither finished nor abandoned. */
    FLEECEBOX_MOCK_LEAKED,
    /* The image cannot be opened, because of `error`. */
    FLEECEBOX_MOCK_NOT_OPENED,
    /* The image answers `error` for `range`, which was claimed. */
    FLEECEBOX_MOCK_NOT_GIVEN_BACK,
    /* The image gives back other bytes than the disk held in `range`. */
    FLEECEBOX_MOCK_WRONG,
} fleecebox_mock_failure;

/* An object that a backup finished. */
typedef struct {
    char *name;
    uint8_t *bytes;
    size_t length;
} fleecebox_mock_object;

/* What a backup came to. After a failure the next one covers the same changes again. */
typedef struct {
    fleecebox_mock_failure failure;
    /* In words, where it failed. */
    char why[512];
    /* With some failures, as they say. Texts of it are cut off. */
    uint8_t error;
    fleecebox_extent range;
    /* The whole disk as of this backup: what was placed from the archive, what was claimed from the image. */
    uint8_t *restored;
    /* What `run` returned. */
    fleecebox_bytes receipt;
    /* The objects that this backup finished. */
    fleecebox_mock_object *objects;
    size_t objects_count;
    /* The lines of its log. */
    char **log;
    size_t log_count;
} fleecebox_mock_backup;

/* A disk of that many bytes, all zero. */
fleecebox_mock_disk *fleecebox_mock_disk_new(const char *name, size_t size);

/* Frees it with all its backups. */
void fleecebox_mock_disk_free(fleecebox_mock_disk *disk);

/* What it holds now. */
const uint8_t *fleecebox_mock_bytes(const fleecebox_mock_disk *disk);

/* Writes as a guest does. Aborts if that ends past the disk. */
void fleecebox_mock_write(fleecebox_mock_disk *disk, size_t offset, const void *bytes, size_t length);

/* The provider's settings from here on (TOML). */
void fleecebox_mock_set_settings(fleecebox_mock_disk *disk, const char *toml);

/* Attaches something, such as `guest-config`; at most 16 of them. */
void fleecebox_mock_attach(fleecebox_mock_disk *disk, const char *name, const void *bytes, size_t length);

/* Grants no reader, no discarder from here on. */
void fleecebox_mock_withhold_reader(fleecebox_mock_disk *disk);
void fleecebox_mock_withhold_discarder(fleecebox_mock_disk *disk);

/* Lets one call of the next backup fail: that of this number, counted from 1, of all that may; with FLEECEBOX_IO, say. */
void fleecebox_mock_fail(fleecebox_mock_disk *disk, unsigned nth_call, uint8_t error);

/*
 * Backs the disk up with the provider that the program exports, and reads back what was claimed. The backup is the
 * disk's, and there until that is freed.
 */
const fleecebox_mock_backup *fleecebox_mock_back_up(fleecebox_mock_disk *disk);

/* The object of that name; NULL if there is none. */
const fleecebox_mock_object *fleecebox_mock_object_of(const fleecebox_mock_backup *backup, const char *name);

#endif
