/*
 * Write a Fleecebox backup provider in C.
 *
 * A provider backs up one volume per call. It is handed a few capabilities and reaches nothing else; the host moves
 * the bytes, remembers where each block is, and proves the backup before it counts. There are two kinds:
 *
 * - a blind provider arranges what the host stores and cannot see a byte of the disk. Most providers are best blind.
 *   Build it with -DFLEECEBOX_BLIND and end one source file with FLEECEBOX_EXPORT_BLIND(run);
 * - a provider that reads the bytes, writes them in a form of its own, claims the ranges that it holds, and gives them
 *   back through its image: FLEECEBOX_EXPORT(run, image_open, image_read, image_close).
 *
 * A whole blind provider, which keeps each volume's changes as one object:
 *
 *     #include "fleecebox-guest.h"
 *
 *     static bool run(const fleecebox_context *job, fleecebox_volume *volume, const fleecebox_archive *archive,
 *                     const fleecebox_bytes *base, fleecebox_bytes *receipt, fleecebox_error *error)
 *     {
 *         fleecebox_volume_info info = fleecebox_snapshot_info(&volume->snapshot);
 *         fleecebox_output_stream object;
 *         if (!fleecebox_create(archive, info.name, FLEECEBOX_ZSTD, &object, error))
 *             return false;
 *         fleecebox_data_runs runs = fleecebox_runs_of(&volume->dirty);
 *         fleecebox_extent run;
 *         for (;;) {
 *             if (!fleecebox_next_run(&runs, &run, error))
 *                 return false;
 *             if (run.length == 0)
 *                 break;
 *             if (!fleecebox_splice(&object, &volume->snapshot, run, error))
 *                 return false;
 *         }
 *         uint64_t size;
 *         return fleecebox_finish(&object, &size, error);
 *     }
 *
 *     FLEECEBOX_EXPORT_BLIND(run)
 *
 * Rules that hold throughout:
 *
 * - A function that can fail returns whether it succeeded. If not, `*error` says why, and nothing else was changed.
 *   Return false from `run` with that same error, and the host shows it to the operator.
 * - Offsets, lengths and sizes are in bytes.
 * - Names and messages are UTF-8 strings that end with a NUL. Bytes are a pointer and a length.
 * - What a function allocates for you is yours: fleecebox_free_bytes, or free() for strings.
 * - Handles belong to the host and end with the call that they were passed to. Nothing needs to be closed, but for an
 *   object that is given up: fleecebox_abandon.
 *
 * The contract itself, with the rules for ranges and names, is bindings/provider.wit. Functions that are not needed do
 * not reach the component.
 */
#ifndef FLEECEBOX_GUEST_H
#define FLEECEBOX_GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FLEECEBOX_BLIND
#include "bindings/blind-provider/fleecebox.h"
#else
#include "bindings/provider/fleecebox.h"
#endif

/* Longest range that one fleecebox_put takes, in bytes. */
#define FLEECEBOX_MAX_PUT ((uint64_t)1 << 20)

/* Bytes with a length. A length of 0 may have any pointer. */
typedef fleecebox_list_u8_t fleecebox_bytes;

static inline void fleecebox_free_bytes(fleecebox_bytes *bytes)
{
    if (bytes->len > 0)
        free(bytes->ptr);
    *bytes = (fleecebox_bytes){0};
}

/* Copies bytes, so that they can be handed over: a receipt, for one. */
static inline fleecebox_bytes fleecebox_copy_bytes(const void *bytes, size_t length)
{
    fleecebox_bytes copy = {0};
    if (length > 0) {
        copy.ptr = malloc(length);
        if (copy.ptr == NULL)
            abort();
        memcpy(copy.ptr, bytes, length);
        copy.len = length;
    }
    return copy;
}

/* For calls that only look at the string. */
static inline fleecebox_string_t fleecebox_text_(const char *text)
{
    return (fleecebox_string_t){(uint8_t *)text, strlen(text)};
}

/* ---- Errors ---------------------------------------------------------------------------------------------------- */

/*
 * Why a call failed: the contract's `error-code`. `tag` is one of the constants below; for FLEECEBOX_QUOTA_EXCEEDED,
 * `val.quota_exceeded` is the limit. Details of host failures go to the host's log.
 */
typedef fleecebox_provider_types_error_code_t fleecebox_error;

/* Its kinds, by the names and with the meanings of the contract. */
enum {
    FLEECEBOX_CANCELLED = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_CANCELLED,
    FLEECEBOX_DISCARDED = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_DISCARDED,
    FLEECEBOX_EXISTS = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_EXISTS,
    FLEECEBOX_IO = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_IO,
    FLEECEBOX_INVALID_NAME = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_INVALID_NAME,
    FLEECEBOX_NOT_DIRTY = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_NOT_DIRTY,
    FLEECEBOX_NOT_FOUND = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_NOT_FOUND,
    FLEECEBOX_OUT_OF_RANGE = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_OUT_OF_RANGE,
    FLEECEBOX_QUOTA_EXCEEDED = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_QUOTA_EXCEEDED,
    FLEECEBOX_TOO_LARGE = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_TOO_LARGE,
    FLEECEBOX_OTHER = FLEECEBOX_PROVIDER_TYPES_ERROR_CODE_OTHER,
};

/* Limits that the host's policy sets. */
enum {
    FLEECEBOX_QUOTA_OBJECTS = FLEECEBOX_PROVIDER_TYPES_QUOTA_OBJECTS,
    FLEECEBOX_QUOTA_OUTPUT_BYTES = FLEECEBOX_PROVIDER_TYPES_QUOTA_OUTPUT_BYTES,
    FLEECEBOX_QUOTA_READ_BYTES = FLEECEBOX_PROVIDER_TYPES_QUOTA_READ_BYTES,
};

/* Makes an error of the provider's own words: one line that the operator reads. Returns false, to be returned. */
__attribute__((format(printf, 2, 3))) static inline bool fleecebox_fail(fleecebox_error *error, const char *words, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, words);
    vsnprintf(line, sizeof line, words, arguments);
    va_end(arguments);
    error->tag = FLEECEBOX_OTHER;
    error->val.other.is_some = true;
    fleecebox_string_dup(&error->val.other.val, line);
    return false;
}

/* ---- The job --------------------------------------------------------------------------------------------------- */

/* The job: its id, the provider's settings, what the operator attached, and the log. */
typedef struct {
    fleecebox_provider_job_own_context_t handle;
} fleecebox_context;

/* How much a line of the log matters. */
typedef enum {
    /* For the provider's author. */
    FLEECEBOX_DEBUG = FLEECEBOX_PROVIDER_JOB_LEVEL_DEBUG,
    /* Progress worth keeping. */
    FLEECEBOX_INFO = FLEECEBOX_PROVIDER_JOB_LEVEL_INFO,
    /* Something is odd; the backup goes on. */
    FLEECEBOX_WARN = FLEECEBOX_PROVIDER_JOB_LEVEL_WARN,
    /* Something failed. */
    FLEECEBOX_ERROR = FLEECEBOX_PROVIDER_JOB_LEVEL_ERROR,
} fleecebox_level;

static inline char *fleecebox_take_text_(fleecebox_string_t text)
{
    char *taken = malloc(text.len + 1);
    if (taken == NULL)
        abort();
    memcpy(taken, text.ptr, text.len);
    taken[text.len] = 0;
    fleecebox_string_free(&text);
    return taken;
}

/* Opaque and unique. To be freed. */
static inline char *fleecebox_id(const fleecebox_context *job)
{
    fleecebox_string_t text;
    fleecebox_provider_job_method_context_id(fleecebox_provider_job_borrow_context(job->handle), &text);
    return fleecebox_take_text_(text);
}

/* The provider's settings as the operator wrote them (TOML). Empty if there are none. To be freed. */
static inline char *fleecebox_settings_text(const fleecebox_context *job)
{
    fleecebox_string_t text;
    fleecebox_provider_job_method_context_settings(fleecebox_provider_job_borrow_context(job->handle), &text);
    return fleecebox_take_text_(text);
}

/* What the operator attached under that name, such as `guest-config`. False if there is nothing. */
static inline bool fleecebox_attachment(const fleecebox_context *job, const char *name, fleecebox_bytes *attachment)
{
    fleecebox_string_t text = fleecebox_text_(name);
    return fleecebox_provider_job_method_context_attachment(fleecebox_provider_job_borrow_context(job->handle), &text,
                                                            attachment);
}

/* Adds a line to the job's log, of at most 4 KiB. The host leaves out lines that come too fast. */
__attribute__((format(printf, 3, 4))) static inline void
fleecebox_log(const fleecebox_context *job, fleecebox_level level, const char *message, ...)
{
    char line[4096];
    va_list arguments;
    va_start(arguments, message);
    vsnprintf(line, sizeof line, message, arguments);
    va_end(arguments);
    fleecebox_string_t text = fleecebox_text_(line);
    fleecebox_provider_job_method_context_log(fleecebox_provider_job_borrow_context(job->handle), level, &text);
}

#define fleecebox_debug(job, ...) fleecebox_log(job, FLEECEBOX_DEBUG, __VA_ARGS__)
#define fleecebox_info(job, ...) fleecebox_log(job, FLEECEBOX_INFO, __VA_ARGS__)
#define fleecebox_warn(job, ...) fleecebox_log(job, FLEECEBOX_WARN, __VA_ARGS__)

/* ---- Ranges ---------------------------------------------------------------------------------------------------- */

/* The half-open byte range `offset .. offset + length` of a volume. */
typedef fleecebox_provider_types_extent_t fleecebox_extent;

/* The byte after the last. No range that the host hands out overflows. */
static inline uint64_t fleecebox_end(fleecebox_extent range)
{
    return range.offset + range.length;
}

/*
 * Cuts the first piece off a range, at the next multiple of `grid` counted from the volume's start, so that the same
 * place of a volume is always cut the same way. Of an empty range it is empty. `grid` is not 0. If it is a multiple of
 * the block size, pieces of whole blocks are whole blocks.
 *
 *     while (range.length > 0) {
 *         fleecebox_extent piece = fleecebox_cut(&range, grid);
 */
static inline fleecebox_extent fleecebox_cut(fleecebox_extent *range, uint64_t grid)
{
    uint64_t length = grid - range->offset % grid;
    if (length > range->length)
        length = range->length;
    fleecebox_extent piece = {range->offset, length};
    range->offset += length;
    range->length -= length;
    return piece;
}

/* ---- The volume ------------------------------------------------------------------------------------------------ */

/* What is known of the changes since an earlier backup. */
typedef enum {
    /* Nothing is tracked: the whole volume is to be backed up. */
    FLEECEBOX_NONE = FLEECEBOX_PROVIDER_VOLUME_BITMAP_MODE_NONE,
    /* Tracking starts with this backup: the whole volume is to be backed up. */
    FLEECEBOX_NEW = FLEECEBOX_PROVIDER_VOLUME_BITMAP_MODE_NEW,
    /* Only what changed since the base is to be backed up. */
    FLEECEBOX_REUSE = FLEECEBOX_PROVIDER_VOLUME_BITMAP_MODE_REUSE,
} fleecebox_bitmap_mode;

/* What a provider may know about a volume. */
typedef struct {
    /* Stable across backups, such as `drive-scsi0`, and fit for the name of an object, so at most 128 bytes. */
    char name[129];
    /* In bytes. Need not be a multiple of the block size. */
    uint64_t size;
    /* In bytes, a power of two. Ranges begin and end on multiples of this, but for the volume's end. */
    uint32_t block_size;
    /* What the dirty regions are made from. */
    fleecebox_bitmap_mode mode;
} fleecebox_volume_info;

/* Names one frozen volume. It reveals no byte of it: the host copies on the holder's behalf. */
typedef struct {
    fleecebox_provider_volume_own_snapshot_t handle;
} fleecebox_snapshot;

/* What the volume is. The same at every call. */
static inline fleecebox_volume_info fleecebox_snapshot_info(const fleecebox_snapshot *snapshot)
{
    fleecebox_provider_volume_volume_info_t told;
    fleecebox_provider_volume_method_snapshot_info(fleecebox_provider_volume_borrow_snapshot(snapshot->handle), &told);
    fleecebox_volume_info info = {.size = told.size, .block_size = told.block_size, .mode = told.mode};
    if (told.name.len >= sizeof info.name)
        abort();
    memcpy(info.name, told.name.ptr, told.name.len);
    fleecebox_provider_volume_volume_info_free(&told);
    return info;
}

/* What is known of a region without reading it. */
enum {
    /* To be backed up. It may still read as zeroes. */
    FLEECEBOX_DATA = FLEECEBOX_PROVIDER_TYPES_REGION_KIND_DATA,
    /* Reads as zeroes. The host has recorded it already; nothing needs to be done. */
    FLEECEBOX_ZERO = FLEECEBOX_PROVIDER_TYPES_REGION_KIND_ZERO,
};

/* A part of what is to be backed up: `range`, of whole blocks and never empty, and the `kind` of all of it. */
typedef fleecebox_provider_types_region_t fleecebox_region;

/*
 * What is to be backed up: regions in ascending order that do not overlap. Neighbours may be of the same kind; how the
 * host cuts them means nothing.
 */
typedef struct {
    fleecebox_provider_volume_own_dirty_regions_t handle;
    fleecebox_provider_volume_list_region_t batch;
    size_t used;
} fleecebox_dirty_regions;

/* Regions that one call asks the host for: enough that calls cost nothing beside the copying. */
#define FLEECEBOX_REGIONS_PER_CALL 1024

/* The next region; one of length 0 is the end. Fails if the host cannot say what comes next. */
static inline bool
fleecebox_next_region(fleecebox_dirty_regions *dirty, fleecebox_region *region, fleecebox_error *error)
{
    if (dirty->used == dirty->batch.len) {
        fleecebox_provider_volume_list_region_free(&dirty->batch);
        dirty->batch = (fleecebox_provider_volume_list_region_t){0};
        dirty->used = 0;
        if (!fleecebox_provider_volume_method_dirty_regions_next(
                fleecebox_provider_volume_borrow_dirty_regions(dirty->handle), FLEECEBOX_REGIONS_PER_CALL,
                &dirty->batch, error))
            return false;
    }
    *region = dirty->used < dirty->batch.len ? dirty->batch.ptr[dirty->used++] : (fleecebox_region){0};
    return true;
}

/* Runs of data, ascending and apart from each other. */
typedef struct {
    fleecebox_dirty_regions *dirty;
    fleecebox_extent begun;
} fleecebox_data_runs;

/*
 * Only what has to be stored: zero regions are left out, for the host has recorded them, and neighbouring data regions
 * are joined. So runs depend on the volume's content alone, which chunks that are to be found again need.
 */
static inline fleecebox_data_runs fleecebox_runs_of(fleecebox_dirty_regions *dirty)
{
    return (fleecebox_data_runs){.dirty = dirty};
}

/* The next run; one of length 0 is the end. Fails if the host cannot say what comes next. */
static inline bool fleecebox_next_run(fleecebox_data_runs *runs, fleecebox_extent *run, fleecebox_error *error)
{
    fleecebox_region region;
    for (;;) {
        if (!fleecebox_next_region(runs->dirty, &region, error))
            return false;
        if (region.range.length > 0 && region.kind == FLEECEBOX_ZERO)
            continue;
        if (region.range.length > 0 && runs->begun.length > 0 && fleecebox_end(runs->begun) == region.range.offset) {
            runs->begun.length += region.range.length;
            continue;
        }
        *run = runs->begun;
        runs->begun = region.range;
        if (run->length > 0 || region.range.length == 0)
            return true;
    }
}

#ifndef FLEECEBOX_BLIND
/* Authority to see a volume's bytes. */
typedef struct {
    fleecebox_provider_content_own_reader_t handle;
} fleecebox_reader;

/* Most bytes that one fleecebox_read may ask for, at least 64 KiB. Ascending reads of about this size are fastest. */
static inline uint32_t fleecebox_max_read(const fleecebox_reader *reader)
{
    return fleecebox_provider_content_method_reader_max_read(fleecebox_provider_content_borrow_reader(reader->handle));
}

/* Reads exactly `length` bytes at any offset within the dirty regions. The bytes are to be freed. */
static inline bool fleecebox_read(const fleecebox_reader *reader, uint64_t offset, uint32_t length,
                                  fleecebox_bytes *bytes, fleecebox_error *error)
{
    return fleecebox_provider_content_method_reader_read(fleecebox_provider_content_borrow_reader(reader->handle),
                                                         offset, length, bytes, error);
}
#endif

/* Authority to give snapshot space back early. Acts on the fleecing image only, never on the disk of the VM. */
typedef struct {
    fleecebox_provider_volume_own_discarder_t handle;
} fleecebox_discarder;

/* Gives up a range of whole blocks whose backup is finished: nothing reads it again in this backup. */
static inline bool
fleecebox_discard(const fleecebox_discarder *discarder, fleecebox_extent range, fleecebox_error *error)
{
    return fleecebox_provider_volume_method_discarder_discard(
        fleecebox_provider_volume_borrow_discarder(discarder->handle), &range, error);
}

/* What a backup may do with one volume. What is NULL, the operator's policy does not grant. */
typedef struct {
    /* The volume. */
    fleecebox_snapshot snapshot;
    /* What of it is to be backed up. */
    fleecebox_dirty_regions dirty;
#ifndef FLEECEBOX_BLIND
    /* Authority to see its bytes. */
    const fleecebox_reader *reader;
#endif
    /* Authority to give snapshot space back early. */
    const fleecebox_discarder *discarder;
} fleecebox_volume;

/* ---- Storing --------------------------------------------------------------------------------------------------- */

/* How the host encodes what it stores. It decodes again when reading, so that sizes are those before encoding. */
typedef enum {
    /* Stored as it is. */
    FLEECEBOX_IDENTITY = FLEECEBOX_PROVIDER_TYPES_ENCODING_IDENTITY,
    /* Compressed with Zstandard at a level that the operator chooses. */
    FLEECEBOX_ZSTD = FLEECEBOX_PROVIDER_TYPES_ENCODING_ZSTD,
} fleecebox_encoding;

/* Authority to store. */
typedef struct {
    fleecebox_provider_archive_own_writer_t handle;
} fleecebox_archive;

/*
 * Stores a range of whole blocks, at most FLEECEBOX_MAX_PUT long, as one chunk that is addressed by its content and
 * stored once. May return before the copy is done; a failure then shows in a later call, or fails the backup.
 */
static inline bool fleecebox_put(const fleecebox_archive *archive, const fleecebox_snapshot *source,
                                 fleecebox_extent range, fleecebox_encoding encoding, fleecebox_error *error)
{
    return fleecebox_provider_archive_method_writer_put(fleecebox_provider_archive_borrow_writer(archive->handle),
                                                        fleecebox_provider_volume_borrow_snapshot(source->handle),
                                                        &range, encoding, error);
}

/* An object under construction. If `run` returns before it is finished, it is discarded, and all that it covered. */
typedef struct {
    fleecebox_provider_archive_own_output_stream_t handle;
    uint32_t max_write;
} fleecebox_output_stream;

static inline fleecebox_provider_archive_borrow_output_stream_t
fleecebox_borrow_(const fleecebox_output_stream *object)
{
    return fleecebox_provider_archive_borrow_output_stream(object->handle);
}

/*
 * Starts an object. Its name is unique within the backup, which may have other volumes, and plain: 1 to 128 ASCII
 * letters, digits, `-`, `_` and `.`, not beginning with `.`.
 */
static inline bool fleecebox_create(const fleecebox_archive *archive, const char *name, fleecebox_encoding encoding,
                                    fleecebox_output_stream *object, fleecebox_error *error)
{
    fleecebox_string_t text = fleecebox_text_(name);
    if (!fleecebox_provider_archive_method_writer_create(fleecebox_provider_archive_borrow_writer(archive->handle),
                                                         &text, encoding, &object->handle, error))
        return false;
    object->max_write = fleecebox_provider_archive_method_output_stream_max_write(fleecebox_borrow_(object));
    return true;
}

/* Appends bytes of the provider's own making, in as many calls as it takes. Nothing is buffered. */
static inline bool
fleecebox_write(const fleecebox_output_stream *object, const void *bytes, size_t length, fleecebox_error *error)
{
    const uint8_t *next = bytes;
    while (length > 0) {
        fleecebox_list_u8_t part = {(uint8_t *)next, length < object->max_write ? length : object->max_write};
        if (!fleecebox_provider_archive_method_output_stream_write(fleecebox_borrow_(object), &part, error))
            return false;
        next += part.len;
        length -= part.len;
    }
    return true;
}

/*
 * Appends a range of whole blocks, of any length, without passing it through the provider. May return before the copy
 * is done; a failure then shows in a later call or in fleecebox_finish.
 */
static inline bool fleecebox_splice(const fleecebox_output_stream *object, const fleecebox_snapshot *source,
                                    fleecebox_extent range, fleecebox_error *error)
{
    return fleecebox_provider_archive_method_output_stream_splice(
        fleecebox_borrow_(object), fleecebox_provider_volume_borrow_snapshot(source->handle), &range, error);
}

#ifndef FLEECEBOX_BLIND
/*
 * Says that the bytes written so far hold the backup of a range of whole blocks, of any length, which `image_read` will
 * give back. The host checks it before it commits.
 */
static inline bool fleecebox_claim(const fleecebox_output_stream *object, const fleecebox_snapshot *source,
                                   fleecebox_extent range, fleecebox_error *error)
{
    return fleecebox_provider_archive_method_output_stream_claim(
        fleecebox_borrow_(object), fleecebox_provider_volume_borrow_snapshot(source->handle), &range, error);
}
#endif

/*
 * Makes the object durable; `*size` is its size before encoding. After a failure it is gone, and all that it covered.
 * Either way the stream is used up.
 */
static inline bool fleecebox_finish(fleecebox_output_stream *object, uint64_t *size, fleecebox_error *error)
{
    return fleecebox_provider_archive_static_output_stream_finish(object->handle, size, error);
}

/* Gives up an object that was not finished, and all that it covered. */
static inline void fleecebox_abandon(fleecebox_output_stream *object)
{
    fleecebox_provider_archive_output_stream_drop_own(object->handle);
}

/* ---- Reading back ---------------------------------------------------------------------------------------------- */

#ifndef FLEECEBOX_BLIND
/* The objects that this provider wrote, of one finished backup. */
typedef struct {
    fleecebox_provider_stored_own_objects_t handle;
} fleecebox_objects;

/* Size of an object before encoding, in bytes. */
static inline bool
fleecebox_object_size(const fleecebox_objects *objects, const char *name, uint64_t *size, fleecebox_error *error)
{
    fleecebox_string_t text = fleecebox_text_(name);
    return fleecebox_provider_stored_method_objects_size(fleecebox_provider_stored_borrow_objects(objects->handle),
                                                         &text, size, error);
}

/* Most bytes that one call asks for, so that an answer stays a small part of the provider's memory. */
#define FLEECEBOX_READ_AT_ONCE ((uint32_t)1 << 20)

/* Fills `bytes` with `length` bytes of an object from `offset` on, in as many calls as it takes. */
static inline bool fleecebox_read_object(const fleecebox_objects *objects, const char *name, uint64_t offset,
                                         void *bytes, size_t length, fleecebox_error *error)
{
    fleecebox_string_t text = fleecebox_text_(name);
    uint8_t *next = bytes;
    while (length > 0) {
        uint32_t part = length < FLEECEBOX_READ_AT_ONCE ? (uint32_t)length : FLEECEBOX_READ_AT_ONCE;
        fleecebox_bytes answer;
        if (!fleecebox_provider_stored_method_objects_read(
                fleecebox_provider_stored_borrow_objects(objects->handle), &text, offset, part, &answer, error))
            return false;
        memcpy(next, answer.ptr, part);
        fleecebox_free_bytes(&answer);
        next += part;
        offset += part;
        length -= part;
    }
    return true;
}
#endif

/* ---- The exports ----------------------------------------------------------------------------------------------- */

/*
 * Backs up one volume. Volumes may run side by side, each in an instance of its own that shares no memory with this
 * one. `base` is what this returned for the volume in the backup that this one builds on, NULL if there is none.
 * `*receipt` is empty at first; what it is at the end is kept with the backup: at most 64 KiB, made by
 * fleecebox_copy_bytes.
 */
typedef bool fleecebox_run(const fleecebox_context *job, fleecebox_volume *volume, const fleecebox_archive *archive,
                           const fleecebox_bytes *base, fleecebox_bytes *receipt, fleecebox_error *error);

#ifdef FLEECEBOX_BLIND

/* Makes a component of a blind provider. Once per program. */
#define FLEECEBOX_EXPORT_BLIND(run)                                                                                   \
    FLEECEBOX_NO_WASI_                                                                                                \
    bool exports_fleecebox_provider_blind_backup_run(                                                                 \
        exports_fleecebox_provider_blind_backup_own_context_t job,                                                    \
        exports_fleecebox_provider_blind_backup_grant_t *grant,                                                       \
        exports_fleecebox_provider_blind_backup_own_writer_t archive, fleecebox_list_u8_t *base,                      \
        fleecebox_list_u8_t *receipt, exports_fleecebox_provider_blind_backup_error_code_t *error)                    \
    {                                                                                                                 \
        fleecebox_discarder discarder = {grant->discarder.val};                                                       \
        fleecebox_volume volume = {                                                                                   \
            .snapshot = {grant->snapshot},                                                                            \
            .dirty = {.handle = grant->dirty},                                                                        \
            .discarder = grant->discarder.is_some ? &discarder : NULL,                                                \
        };                                                                                                            \
        return fleecebox_call_(run, (fleecebox_context){job}, &volume, (fleecebox_archive){archive}, base, receipt,   \
                               error);                                                                                \
    }

#else

/*
 * An opened image is what the provider makes of it: `open` sets `*image`, `read` gets it again, and `close` frees it.
 *
 * `open` opens the image that the receipt of `run` stands for. `objects` holds what all volumes of that backup wrote,
 * for as long as the image lives.
 *
 * `read` fills `bytes` with exactly `length` bytes of the volume, at most 4 MiB. It is called in any order, for ranges
 * of whole blocks that were claimed in this very backup, though not necessarily by one claim.
 */
typedef bool fleecebox_image_open(const fleecebox_context *job, fleecebox_objects objects,
                                  const fleecebox_bytes *receipt, void **image, fleecebox_error *error);
typedef bool
fleecebox_image_read(void *image, uint64_t offset, uint32_t length, uint8_t *bytes, fleecebox_error *error);
typedef void fleecebox_image_close(void *image);

/* Makes a component of a provider. Once per program. */
#define FLEECEBOX_EXPORT(run, image_open, image_read, image_close)                                                    \
    FLEECEBOX_NO_WASI_                                                                                                \
    bool exports_fleecebox_provider_backup_run(                                                                       \
        exports_fleecebox_provider_backup_own_context_t job, exports_fleecebox_provider_backup_grant_t *grant,        \
        exports_fleecebox_provider_backup_own_writer_t archive, fleecebox_list_u8_t *base,                            \
        fleecebox_list_u8_t *receipt, exports_fleecebox_provider_backup_error_code_t *error)                          \
    {                                                                                                                 \
        fleecebox_reader reader = {grant->reader.val};                                                                \
        fleecebox_discarder discarder = {grant->discarder.val};                                                       \
        fleecebox_volume volume = {                                                                                   \
            .snapshot = {grant->snapshot},                                                                            \
            .dirty = {.handle = grant->dirty},                                                                        \
            .reader = grant->reader.is_some ? &reader : NULL,                                                         \
            .discarder = grant->discarder.is_some ? &discarder : NULL,                                                \
        };                                                                                                            \
        bool done = fleecebox_call_(run, (fleecebox_context){job}, &volume, (fleecebox_archive){archive}, base,       \
                                    receipt, error);                                                                  \
        if (grant->reader.is_some)                                                                                    \
            fleecebox_provider_content_reader_drop_own(reader.handle);                                                \
        return done;                                                                                                  \
    }                                                                                                                 \
    bool exports_fleecebox_provider_restore_static_image_open(                                                        \
        exports_fleecebox_provider_restore_own_context_t job,                                                         \
        exports_fleecebox_provider_restore_own_objects_t objects, fleecebox_list_u8_t *receipt,                       \
        exports_fleecebox_provider_restore_own_image_t *opened, exports_fleecebox_provider_restore_error_code_t *error) \
    {                                                                                                                 \
        fleecebox_image_open *open = image_open;                                                                      \
        fleecebox_context context = {job};                                                                            \
        void *image = NULL;                                                                                           \
        bool done = open(&context, (fleecebox_objects){objects}, receipt, &image, error);                             \
        fleecebox_free_bytes(receipt);                                                                                \
        if (done)                                                                                                     \
            *opened = exports_fleecebox_provider_restore_image_new(image);                                            \
        return done;                                                                                                  \
    }                                                                                                                 \
    bool exports_fleecebox_provider_restore_method_image_read(                                                        \
        exports_fleecebox_provider_restore_borrow_image_t image, uint64_t offset, uint32_t length,                    \
        fleecebox_list_u8_t *bytes, exports_fleecebox_provider_restore_error_code_t *error)                           \
    {                                                                                                                 \
        fleecebox_image_read *read = image_read;                                                                      \
        *bytes = (fleecebox_list_u8_t){malloc(length), length};                                                       \
        if (bytes->ptr == NULL)                                                                                       \
            abort();                                                                                                  \
        if (read(image, offset, length, bytes->ptr, error))                                                           \
            return true;                                                                                              \
        free(bytes->ptr);                                                                                             \
        return false;                                                                                                 \
    }                                                                                                                 \
    void exports_fleecebox_provider_restore_image_destructor(exports_fleecebox_provider_restore_image_t *image)       \
    {                                                                                                                 \
        fleecebox_image_close *close = image_close;                                                                   \
        close(image);                                                                                                 \
    }

#endif

/* What both kinds of export do around `run`: end the handles. */
static inline bool
fleecebox_call_(fleecebox_run *run, fleecebox_context job, fleecebox_volume *volume, fleecebox_archive archive,
                fleecebox_bytes *base, fleecebox_bytes *receipt, fleecebox_error *error)
{
    *receipt = (fleecebox_bytes){0};
    bool done = run(&job, volume, &archive, base, receipt, error);
    if (base != NULL)
        fleecebox_free_bytes(base);
    fleecebox_provider_volume_list_region_free(&volume->dirty.batch);
    fleecebox_provider_volume_dirty_regions_drop_own(volume->dirty.handle);
    if (volume->discarder != NULL)
        fleecebox_provider_volume_discarder_drop_own(volume->discarder->handle);
    fleecebox_provider_volume_snapshot_drop_own(volume->snapshot.handle);
    fleecebox_provider_archive_writer_drop_own(archive.handle);
    fleecebox_provider_job_context_drop_own(job.handle);
    return done;
}

/*
 * The C library's formatted output refers to the system's files, though vsnprintf writes to none; a provider has no
 * files, and no system. So these take the place of what would be imports: any output is refused. A program that needs
 * more of WASI fails to get it at its start, by name.
 */
#define FLEECEBOX_NO_WASI_                                                                                            \
    int32_t __imported_wasi_snapshot_preview1_fd_close(int32_t fd) { return 8; }                                      \
    int32_t __imported_wasi_snapshot_preview1_fd_seek(int32_t fd, int64_t to, int32_t from, int32_t at) { return 8; } \
    int32_t __imported_wasi_snapshot_preview1_fd_write(int32_t fd, int32_t v, int32_t n, int32_t at) { return 8; }

#endif
