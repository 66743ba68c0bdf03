/* The mock's side of each call, with the functions of the generated bindings. What it refuses, the real host refuses. */

#include "mock.h"

/* Unit of dirty tracking, in bytes, as the host has it unless configured. */
#define BLOCK ((uint64_t)64 << 10)
#define MAX_TRANSFER ((uint32_t)4 << 20)
#define MAX_NAME 128
#define MAX_ATTACHMENTS 16

/* A block's cover where it is not an unfinished stream, whose number it then is. */
enum { NOTHING = -1, DONE = -2 };

/* Handles that there is one of; a stream's is its number behind these. */
enum { SNAPSHOT = 1, DIRTY, READER, DISCARDER, WRITER, CONTEXT, OBJECTS, IMAGE, FIRST_STREAM };

struct block {
    bool dirty, zero, claimed, discarded;
    int32_t cover;
};

enum stage { OPEN, FINISHED, GONE };

/* An object; `is_written` says of each of its bytes whether the provider wrote it, or it was spliced. */
struct object {
    char name[MAX_NAME + 1];
    enum stage stage;
    uint8_t *bytes;
    bool *is_written;
    size_t length;
};

struct attachment {
    char *name;
    fleecebox_bytes bytes;
};

struct fleecebox_mock_disk {
    char *name, *settings;
    uint8_t *bytes;
    size_t size, blocks_count;
    bool *dirty;
    struct attachment attachments[MAX_ATTACHMENTS];
    size_t attachments_count;
    bool without_reader, without_discarder;
    unsigned fault_call;
    uint8_t fault_error;
    fleecebox_mock_backup **backups;
    size_t backups_count;
    const fleecebox_mock_backup *base;
};

/* The host of the backup that is being made. */
static struct {
    const fleecebox_mock_disk *disk;
    struct block *blocks;
    size_t cursor;
    struct object *objects;
    size_t objects_count;
    unsigned calls, fault_call;
    uint8_t fault_error;
    fleecebox_mock_backup *backup;
    void *image;
} host;

static void *grown(void *memory, size_t size)
{
    void *more = realloc(memory, size > 0 ? size : 1);
    if (more == NULL)
        abort();
    return more;
}

static void *copied(const void *bytes, size_t length)
{
    void *copy = grown(NULL, length);
    if (length > 0)
        memcpy(copy, bytes, length);
    return copy;
}

static char *copied_text(const char *text)
{
    return copied(text, strlen(text) + 1);
}

_Noreturn static void trap(const char *what)
{
    fprintf(stderr, "the mock: %s; in the sandbox this traps\n", what);
    abort();
}

static void expect(int32_t handle, int32_t expected)
{
    if (host.disk == NULL || handle != expected)
        trap("a handle is used that the provider does not hold");
}

/* ---- The books ------------------------------------------------------------------------------------------------- */

static bool refuse(fleecebox_error *error, uint8_t tag)
{
    *error = (fleecebox_error){.tag = tag};
    return false;
}

/* Counts a call that may fail. */
static bool call(fleecebox_error *error)
{
    return ++host.calls != host.fault_call || refuse(error, host.fault_error);
}

static uint64_t length_of(size_t block)
{
    uint64_t rest = host.disk->size - block * BLOCK;
    return rest < BLOCK ? rest : BLOCK;
}

/* The blocks of a range of whole blocks. */
static bool whole(const fleecebox_extent *range, size_t *first, size_t *end, fleecebox_error *error)
{
    uint64_t size = host.disk->size;
    if (range->length == 0 || range->offset > size || range->length > size - range->offset ||
        range->offset % BLOCK != 0 || (fleecebox_end(*range) % BLOCK != 0 && fleecebox_end(*range) != size))
        return refuse(error, FLEECEBOX_OUT_OF_RANGE);
    *first = range->offset / BLOCK;
    *end = (fleecebox_end(*range) + BLOCK - 1) / BLOCK;
    return true;
}

/* Covers a range that nothing covers yet. */
static bool cover(const fleecebox_extent *range, int32_t by, bool claimed, fleecebox_error *error)
{
    size_t first, end;
    if (!whole(range, &first, &end, error))
        return false;
    for (size_t index = first; index < end; index++)
        if (!host.blocks[index].dirty || host.blocks[index].cover != NOTHING)
            return refuse(error, FLEECEBOX_NOT_DIRTY);
    for (size_t index = first; index < end; index++) {
        host.blocks[index].cover = by;
        host.blocks[index].claimed = claimed;
    }
    return true;
}

static void end_stream(int32_t stream, int32_t by)
{
    for (size_t index = 0; index < host.disk->blocks_count; index++)
        if (host.blocks[index].cover == stream)
            host.blocks[index].cover = by;
}

static bool is_uncovered(const struct block *block)
{
    return block->dirty && !block->zero && block->cover != DONE;
}

/* What the provider has to give back. */
static bool is_claimed(const struct block *block)
{
    return !block->zero && block->cover == DONE && block->claimed;
}

/* The next neighbouring blocks that `holds` is true of, joined, from `*index` on; empty at the end. */
static fleecebox_extent next_where(bool (*holds)(const struct block *), size_t *index)
{
    size_t count = host.disk->blocks_count;
    while (*index < count && !holds(&host.blocks[*index]))
        ++*index;
    fleecebox_extent run = {*index * BLOCK, 0};
    for (; *index < count && holds(&host.blocks[*index]); ++*index)
        run.length += length_of(*index);
    return run;
}

static bool is_plain(const char *name, size_t length)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    for (size_t at = 0; at < length; at++)
        if (name[at] == 0 || strchr(plain, name[at]) == NULL)
            return false;
    return length > 0 && length <= MAX_NAME && name[0] != '.';
}

/* The object of that name in a stage; NULL if there is none. */
static struct object *object_named(const fleecebox_string_t *name, enum stage stage)
{
    for (size_t index = 0; index < host.objects_count; index++) {
        struct object *object = &host.objects[index];
        if (object->stage == stage && strlen(object->name) == name->len &&
            memcmp(object->name, name->ptr, name->len) == 0)
            return object;
    }
    return NULL;
}

static struct object *object_of(int32_t handle)
{
    size_t index = (size_t)(handle - FIRST_STREAM);
    if (host.disk == NULL || handle < FIRST_STREAM || index >= host.objects_count)
        trap("a stream is used that the provider does not hold");
    if (host.objects[index].stage != OPEN)
        trap("an object is used after it was finished or given up");
    return &host.objects[index];
}

static void append(struct object *object, const uint8_t *bytes, size_t length, bool is_written)
{
    object->bytes = grown(object->bytes, object->length + length);
    object->is_written = grown(object->is_written, object->length + length);
    if (length > 0)
        memcpy(object->bytes + object->length, bytes, length);
    memset(object->is_written + object->length, is_written, length);
    object->length += length;
}

/* ---- Calls of the volume --------------------------------------------------------------------------------------- */

void fleecebox_provider_volume_method_snapshot_info(fleecebox_provider_volume_borrow_snapshot_t self,
                                                    fleecebox_provider_volume_volume_info_t *info)
{
    expect(self.__handle, SNAPSHOT);
    info->size = host.disk->size;
    info->block_size = BLOCK;
    info->mode = host.disk->base == NULL ? FLEECEBOX_NEW : FLEECEBOX_REUSE;
    fleecebox_string_dup(&info->name, host.disk->name);
}

bool fleecebox_provider_volume_method_dirty_regions_next(fleecebox_provider_volume_borrow_dirty_regions_t self,
                                                         uint32_t limit, fleecebox_provider_volume_list_region_t *next,
                                                         fleecebox_error *error)
{
    expect(self.__handle, DIRTY);
    *next = (fleecebox_provider_volume_list_region_t){0};
    if (!call(error))
        return false;
    if (limit == 0)
        return refuse(error, FLEECEBOX_OUT_OF_RANGE);
    for (; host.cursor < host.disk->blocks_count; host.cursor++) {
        const struct block *block = &host.blocks[host.cursor];
        if (!block->dirty)
            continue;
        uint8_t kind = block->zero ? FLEECEBOX_ZERO : FLEECEBOX_DATA;
        fleecebox_extent range = {host.cursor * BLOCK, length_of(host.cursor)};
        fleecebox_region *last = next->len > 0 ? &next->ptr[next->len - 1] : NULL;
        if (last != NULL && last->kind == kind && fleecebox_end(last->range) == range.offset) {
            last->range.length += range.length;
        } else if (next->len == limit) {
            break;
        } else {
            next->ptr = grown(next->ptr, (next->len + 1) * sizeof *next->ptr);
            next->ptr[next->len++] = (fleecebox_region){range, kind};
        }
    }
    return true;
}

bool fleecebox_provider_volume_method_discarder_discard(fleecebox_provider_volume_borrow_discarder_t self,
                                                        fleecebox_extent *range, fleecebox_error *error)
{
    size_t first, end;
    expect(self.__handle, DISCARDER);
    if (!call(error) || !whole(range, &first, &end, error))
        return false;
    for (size_t index = first; index < end; index++) {
        const struct block *block = &host.blocks[index];
        /* A zero block is done without a cover, but not while an unfinished object covers it. */
        if (!block->dirty || !(block->cover == DONE || (block->zero && block->cover == NOTHING)))
            return refuse(error, FLEECEBOX_NOT_DIRTY);
    }
    for (size_t index = first; index < end; index++)
        host.blocks[index].discarded = true;
    return true;
}

#ifndef FLEECEBOX_BLIND
uint32_t fleecebox_provider_content_method_reader_max_read(fleecebox_provider_content_borrow_reader_t self)
{
    expect(self.__handle, READER);
    return MAX_TRANSFER;
}

bool fleecebox_provider_content_method_reader_read(fleecebox_provider_content_borrow_reader_t self, uint64_t offset,
                                                   uint32_t length, fleecebox_list_u8_t *bytes, fleecebox_error *error)
{
    expect(self.__handle, READER);
    if (!call(error))
        return false;
    if (length > MAX_TRANSFER)
        return refuse(error, FLEECEBOX_TOO_LARGE);
    if (length == 0 || offset > host.disk->size || length > host.disk->size - offset)
        return refuse(error, FLEECEBOX_OUT_OF_RANGE);
    size_t first = offset / BLOCK, end = (offset + length + BLOCK - 1) / BLOCK;
    for (size_t index = first; index < end; index++)
        if (!host.blocks[index].dirty)
            return refuse(error, FLEECEBOX_NOT_DIRTY);
    for (size_t index = first; index < end; index++)
        if (host.blocks[index].discarded)
            return refuse(error, FLEECEBOX_DISCARDED);
    *bytes = fleecebox_copy_bytes(host.disk->bytes + offset, length);
    return true;
}
#endif

/* ---- Calls of the archive -------------------------------------------------------------------------------------- */

bool fleecebox_provider_archive_method_writer_put(fleecebox_provider_archive_borrow_writer_t self,
                                                  fleecebox_provider_archive_borrow_snapshot_t source,
                                                  fleecebox_extent *range, uint8_t encoding, fleecebox_error *error)
{
    (void)encoding;
    expect(self.__handle, WRITER);
    expect(source.__handle, SNAPSHOT);
    if (!call(error))
        return false;
    if (range->length > FLEECEBOX_MAX_PUT)
        return refuse(error, FLEECEBOX_TOO_LARGE);
    return cover(range, DONE, false, error);
}

bool fleecebox_provider_archive_method_writer_create(fleecebox_provider_archive_borrow_writer_t self,
                                                     fleecebox_string_t *name, uint8_t encoding,
                                                     fleecebox_provider_archive_own_output_stream_t *stream,
                                                     fleecebox_error *error)
{
    (void)encoding;
    expect(self.__handle, WRITER);
    if (!call(error))
        return false;
    if (!is_plain((const char *)name->ptr, name->len))
        return refuse(error, FLEECEBOX_INVALID_NAME);
    if (object_named(name, OPEN) != NULL || object_named(name, FINISHED) != NULL)
        return refuse(error, FLEECEBOX_EXISTS);
    host.objects = grown(host.objects, (host.objects_count + 1) * sizeof *host.objects);
    struct object *object = &host.objects[host.objects_count];
    *object = (struct object){0};
    memcpy(object->name, name->ptr, name->len);
    stream->__handle = FIRST_STREAM + (int32_t)host.objects_count++;
    return true;
}

uint32_t fleecebox_provider_archive_method_output_stream_max_write(
    fleecebox_provider_archive_borrow_output_stream_t self)
{
    object_of(self.__handle);
    return MAX_TRANSFER;
}

bool fleecebox_provider_archive_method_output_stream_write(fleecebox_provider_archive_borrow_output_stream_t self,
                                                           fleecebox_list_u8_t *bytes, fleecebox_error *error)
{
    struct object *object = object_of(self.__handle);
    if (!call(error))
        return false;
    if (bytes->len > MAX_TRANSFER)
        return refuse(error, FLEECEBOX_TOO_LARGE);
    append(object, bytes->ptr, bytes->len, true);
    return true;
}

bool fleecebox_provider_archive_method_output_stream_splice(fleecebox_provider_archive_borrow_output_stream_t self,
                                                            fleecebox_provider_archive_borrow_snapshot_t source,
                                                            fleecebox_extent *range, fleecebox_error *error)
{
    struct object *object = object_of(self.__handle);
    expect(source.__handle, SNAPSHOT);
    if (!call(error) || !cover(range, self.__handle, false, error))
        return false;
    append(object, host.disk->bytes + range->offset, range->length, false);
    return true;
}

bool fleecebox_provider_archive_method_output_stream_claim(fleecebox_provider_archive_borrow_output_stream_t self,
                                                           fleecebox_provider_archive_borrow_snapshot_t source,
                                                           fleecebox_extent *range, fleecebox_error *error)
{
    object_of(self.__handle);
    expect(source.__handle, SNAPSHOT);
    if (!call(error))
        return false;
#ifdef FLEECEBOX_BLIND
    (void)range;
    return fleecebox_fail(error, "a blind provider cannot claim: it exports no restore");
#else
    return cover(range, self.__handle, true, error);
#endif
}

void fleecebox_provider_archive_output_stream_drop_own(fleecebox_provider_archive_own_output_stream_t stream)
{
    object_of(stream.__handle)->stage = GONE;
    end_stream(stream.__handle, NOTHING);
}

bool fleecebox_provider_archive_static_output_stream_finish(fleecebox_provider_archive_own_output_stream_t stream,
                                                            uint64_t *size, fleecebox_error *error)
{
    struct object *object = object_of(stream.__handle);
    if (!call(error)) {
        /* After a failure the object is gone. */
        fleecebox_provider_archive_output_stream_drop_own(stream);
        return false;
    }
    object->stage = FINISHED;
    end_stream(stream.__handle, DONE);
    *size = object->length;
    return true;
}

/* ---- Calls of the job ------------------------------------------------------------------------------------------ */

void fleecebox_provider_job_method_context_id(fleecebox_provider_job_borrow_context_t self, fleecebox_string_t *id)
{
    expect(self.__handle, CONTEXT);
    fleecebox_string_dup(id, "mock");
}

void fleecebox_provider_job_method_context_settings(fleecebox_provider_job_borrow_context_t self,
                                                    fleecebox_string_t *settings)
{
    expect(self.__handle, CONTEXT);
    fleecebox_string_dup(settings, host.disk->settings);
}

bool fleecebox_provider_job_method_context_attachment(fleecebox_provider_job_borrow_context_t self,
                                                      fleecebox_string_t *name, fleecebox_list_u8_t *bytes)
{
    expect(self.__handle, CONTEXT);
    for (size_t index = 0; index < host.disk->attachments_count; index++) {
        const struct attachment *attachment = &host.disk->attachments[index];
        if (strlen(attachment->name) == name->len && memcmp(attachment->name, name->ptr, name->len) == 0) {
            *bytes = fleecebox_copy_bytes(attachment->bytes.ptr, attachment->bytes.len);
            return true;
        }
    }
    return false;
}

void fleecebox_provider_job_method_context_log(fleecebox_provider_job_borrow_context_t self, uint8_t level,
                                               fleecebox_string_t *message)
{
    (void)level;
    expect(self.__handle, CONTEXT);
    fleecebox_mock_backup *backup = host.backup;
    char *line = grown(NULL, message->len + 1);
    memcpy(line, message->ptr, message->len);
    line[message->len] = 0;
    backup->log = grown(backup->log, (backup->log_count + 1) * sizeof *backup->log);
    backup->log[backup->log_count++] = line;
}

/* ---- Calls of the image ---------------------------------------------------------------------------------------- */

#ifndef FLEECEBOX_BLIND
static struct object *stored(const fleecebox_string_t *name, fleecebox_error *error)
{
    struct object *object = object_named(name, FINISHED);
    if (!is_plain((const char *)name->ptr, name->len))
        refuse(error, FLEECEBOX_INVALID_NAME);
    else if (object == NULL)
        refuse(error, FLEECEBOX_NOT_FOUND);
    return object;
}

bool fleecebox_provider_stored_method_objects_size(fleecebox_provider_stored_borrow_objects_t self,
                                                   fleecebox_string_t *name, uint64_t *size, fleecebox_error *error)
{
    expect(self.__handle, OBJECTS);
    struct object *object = call(error) ? stored(name, error) : NULL;
    if (object == NULL)
        return false;
    *size = object->length;
    return true;
}

bool fleecebox_provider_stored_method_objects_read(fleecebox_provider_stored_borrow_objects_t self,
                                                   fleecebox_string_t *name, uint64_t offset, uint32_t length,
                                                   fleecebox_list_u8_t *bytes, fleecebox_error *error)
{
    expect(self.__handle, OBJECTS);
    if (!call(error))
        return false;
    if (length > MAX_TRANSFER)
        return refuse(error, FLEECEBOX_TOO_LARGE);
    struct object *object = stored(name, error);
    if (object == NULL)
        return false;
    if (length == 0 || offset > object->length || length > object->length - offset ||
        memchr(object->is_written + offset, false, length) != NULL)
        return refuse(error, FLEECEBOX_OUT_OF_RANGE);
    *bytes = fleecebox_copy_bytes(object->bytes + offset, length);
    return true;
}

exports_fleecebox_provider_restore_own_image_t
exports_fleecebox_provider_restore_image_new(exports_fleecebox_provider_restore_image_t *image)
{
    host.image = image;
    return (exports_fleecebox_provider_restore_own_image_t){IMAGE};
}

void fleecebox_provider_content_reader_drop_own(fleecebox_provider_content_own_reader_t reader)
{
    expect(reader.__handle, READER);
}

void fleecebox_provider_stored_objects_drop_own(fleecebox_provider_stored_own_objects_t objects)
{
    expect(objects.__handle, OBJECTS);
}
#endif

/* ---- What the bindings have besides ---------------------------------------------------------------------------- */

#define HANDLE(interface, name, number)                                                                               \
    fleecebox_provider_##interface##_borrow_##name##_t fleecebox_provider_##interface##_borrow_##name(                \
        fleecebox_provider_##interface##_own_##name##_t handle)                                                       \
    {                                                                                                                 \
        return (fleecebox_provider_##interface##_borrow_##name##_t){handle.__handle};                                 \
    }
#define GRANTED(interface, name, number)                                                                              \
    HANDLE(interface, name, number)                                                                                   \
    void fleecebox_provider_##interface##_##name##_drop_own(fleecebox_provider_##interface##_own_##name##_t handle)   \
    {                                                                                                                 \
        expect(handle.__handle, number);                                                                              \
    }
GRANTED(volume, snapshot, SNAPSHOT)
GRANTED(volume, dirty_regions, DIRTY)
GRANTED(volume, discarder, DISCARDER)
GRANTED(archive, writer, WRITER)
GRANTED(job, context, CONTEXT)
HANDLE(archive, output_stream, FIRST_STREAM)
#ifndef FLEECEBOX_BLIND
HANDLE(content, reader, READER)
HANDLE(stored, objects, OBJECTS)
#endif

void fleecebox_string_set(fleecebox_string_t *string, const char *text)
{
    *string = (fleecebox_string_t){(uint8_t *)text, strlen(text)};
}

void fleecebox_string_dup_n(fleecebox_string_t *string, const char *text, size_t length)
{
    *string = (fleecebox_string_t){copied(text, length), length};
}

void fleecebox_string_dup(fleecebox_string_t *string, const char *text)
{
    fleecebox_string_dup_n(string, text, strlen(text));
}

void fleecebox_string_free(fleecebox_string_t *string)
{
    free(string->ptr);
    *string = (fleecebox_string_t){0};
}

void fleecebox_provider_volume_volume_info_free(fleecebox_provider_volume_volume_info_t *info)
{
    fleecebox_string_free(&info->name);
}

void fleecebox_provider_volume_list_region_free(fleecebox_provider_volume_list_region_t *regions)
{
    free(regions->ptr);
    *regions = (fleecebox_provider_volume_list_region_t){0};
}

void fleecebox_provider_types_error_code_free(fleecebox_error *error)
{
    if (error->tag == FLEECEBOX_OTHER && error->val.other.is_some)
        fleecebox_string_free(&error->val.other.val);
}

/* ---- The disk -------------------------------------------------------------------------------------------------- */

fleecebox_mock_disk *fleecebox_mock_disk_new(const char *name, size_t size)
{
    fleecebox_mock_disk *disk = grown(NULL, sizeof *disk);
    *disk = (fleecebox_mock_disk){
        .name = copied_text(name),
        .settings = copied_text(""),
        .bytes = grown(NULL, size),
        .size = size,
        .blocks_count = (size + BLOCK - 1) / BLOCK,
    };
    memset(disk->bytes, 0, size);
    disk->dirty = grown(NULL, disk->blocks_count);
    memset(disk->dirty, true, disk->blocks_count);
    return disk;
}

static void free_backup(fleecebox_mock_backup *backup)
{
    for (size_t index = 0; index < backup->objects_count; index++) {
        free(backup->objects[index].name);
        free(backup->objects[index].bytes);
    }
    for (size_t index = 0; index < backup->log_count; index++)
        free(backup->log[index]);
    free(backup->objects);
    free(backup->log);
    free(backup->restored);
    fleecebox_free_bytes(&backup->receipt);
    free(backup);
}

void fleecebox_mock_disk_free(fleecebox_mock_disk *disk)
{
    for (size_t index = 0; index < disk->backups_count; index++)
        free_backup(disk->backups[index]);
    for (size_t index = 0; index < disk->attachments_count; index++) {
        free(disk->attachments[index].name);
        fleecebox_free_bytes(&disk->attachments[index].bytes);
    }
    free(disk->backups);
    free(disk->dirty);
    free(disk->bytes);
    free(disk->settings);
    free(disk->name);
    free(disk);
}

const uint8_t *fleecebox_mock_bytes(const fleecebox_mock_disk *disk)
{
    return disk->bytes;
}

void fleecebox_mock_write(fleecebox_mock_disk *disk, size_t offset, const void *bytes, size_t length)
{
    if (offset > disk->size || length > disk->size - offset) {
        fprintf(stderr, "the mock: a write at %zu of %zu bytes ends past the disk\n", offset, length);
        abort();
    }
    if (length == 0)
        return;
    memcpy(disk->bytes + offset, bytes, length);
    for (size_t block = offset / BLOCK; block <= (offset + length - 1) / BLOCK; block++)
        disk->dirty[block] = true;
}

void fleecebox_mock_set_settings(fleecebox_mock_disk *disk, const char *toml)
{
    free(disk->settings);
    disk->settings = copied_text(toml);
}

void fleecebox_mock_attach(fleecebox_mock_disk *disk, const char *name, const void *bytes, size_t length)
{
    if (disk->attachments_count == MAX_ATTACHMENTS)
        abort();
    disk->attachments[disk->attachments_count++] =
        (struct attachment){copied_text(name), fleecebox_copy_bytes(bytes, length)};
}

void fleecebox_mock_withhold_reader(fleecebox_mock_disk *disk)
{
    disk->without_reader = true;
}

void fleecebox_mock_withhold_discarder(fleecebox_mock_disk *disk)
{
    disk->without_discarder = true;
}

void fleecebox_mock_fail(fleecebox_mock_disk *disk, unsigned nth_call, uint8_t error)
{
    disk->fault_call = nth_call;
    disk->fault_error = error;
}

const fleecebox_mock_object *fleecebox_mock_object_of(const fleecebox_mock_backup *backup, const char *name)
{
    for (size_t index = 0; index < backup->objects_count; index++)
        if (strcmp(backup->objects[index].name, name) == 0)
            return &backup->objects[index];
    return NULL;
}

/* ---- A backup -------------------------------------------------------------------------------------------------- */

/* Notes why there is no backup. An error's own text goes into the words, and is freed. */
static bool failed(fleecebox_mock_failure failure, const char *words, fleecebox_extent range, fleecebox_error *error)
{
    static const char *const names[] = {"cancelled",    "discarded",    "exists",         "io",        "invalid-name", "not-dirty",
                                        "not-found",    "out-of-range", "quota-exceeded", "too-large", "other"};
    fleecebox_mock_backup *backup = host.backup;
    backup->failure = failure;
    backup->range = range;
    int used = snprintf(backup->why, sizeof backup->why, "%s", words);
    size_t left = sizeof backup->why - (size_t)used;
    if (range.length > 0)
        used += snprintf(backup->why + used, left, " %llu..%llu", (unsigned long long)range.offset,
                         (unsigned long long)fleecebox_end(range));
    left = sizeof backup->why - (size_t)used;
    if (error == NULL)
        return false;
    backup->error = error->tag;
    bool has_text = error->tag == FLEECEBOX_OTHER && error->val.other.is_some;
    int length = has_text ? (int)error->val.other.val.len : 0;
    const char *name = error->tag < sizeof names / sizeof *names ? names[error->tag] : "no error of the contract";
    snprintf(backup->why + used, left, ": %s %.*s", name, length, has_text ? (char *)error->val.other.val.ptr : "");
    fleecebox_provider_types_error_code_free(error);
    return false;
}

static const fleecebox_extent NOWHERE = {0};

static bool run(void)
{
    const fleecebox_mock_disk *disk = host.disk;
    fleecebox_bytes base = {0};
    fleecebox_error error;
    if (disk->base != NULL)
        base = fleecebox_copy_bytes(disk->base->receipt.ptr, disk->base->receipt.len);
#ifdef FLEECEBOX_BLIND
    exports_fleecebox_provider_blind_backup_grant_t grant = {
        .snapshot = {SNAPSHOT}, .dirty = {DIRTY}, .discarder = {!disk->without_discarder, {DISCARDER}}};
    bool done = exports_fleecebox_provider_blind_backup_run(
        (exports_fleecebox_provider_blind_backup_own_context_t){CONTEXT}, &grant,
        (exports_fleecebox_provider_blind_backup_own_writer_t){WRITER}, disk->base != NULL ? &base : NULL,
        &host.backup->receipt, &error);
#else
    exports_fleecebox_provider_backup_grant_t grant = {.snapshot = {SNAPSHOT},
                                                       .dirty = {DIRTY},
                                                       .reader = {!disk->without_reader, {READER}},
                                                       .discarder = {!disk->without_discarder, {DISCARDER}}};
    bool done = exports_fleecebox_provider_backup_run((exports_fleecebox_provider_backup_own_context_t){CONTEXT},
                                                      &grant,
                                                      (exports_fleecebox_provider_backup_own_writer_t){WRITER},
                                                      disk->base != NULL ? &base : NULL, &host.backup->receipt, &error);
#endif
    if (!done)
        return failed(FLEECEBOX_MOCK_GAVE_UP, "the provider gave up", NOWHERE, &error);
    for (size_t index = 0; index < host.objects_count; index++) {
        if (host.objects[index].stage == OPEN) {
            char words[256];
            snprintf(words, sizeof words, "the object %s was neither finished nor abandoned", host.objects[index].name);
            return failed(FLEECEBOX_MOCK_LEAKED, words, NOWHERE, NULL);
        }
    }
    size_t from = 0;
    fleecebox_extent missing = next_where(is_uncovered, &from);
    return missing.length == 0 ||
           failed(FLEECEBOX_MOCK_UNCOVERED, "neither put, nor in a finished object is", missing, NULL);
}

/* The base with all that the host itself placed. */
static void restore_placed(void)
{
    const fleecebox_mock_disk *disk = host.disk;
    uint8_t *restored = grown(NULL, disk->size);
    if (disk->base == NULL)
        memset(restored, 0, disk->size);
    else
        memcpy(restored, disk->base->restored, disk->size);
    for (size_t index = 0; index < disk->blocks_count; index++) {
        const struct block *block = &host.blocks[index];
        if (block->dirty && !is_claimed(block))
            memcpy(restored + index * BLOCK, disk->bytes + index * BLOCK, length_of(index));
    }
    host.backup->restored = restored;
}

#ifdef FLEECEBOX_BLIND
static bool restore_claimed(void)
{
    return true;
}
#else
static bool restore_claimed_with(exports_fleecebox_provider_restore_borrow_image_t image)
{
    size_t from = 0;
    for (;;) {
        fleecebox_extent rest = next_where(is_claimed, &from);
        if (rest.length == 0)
            return true;
        while (rest.length > 0) {
            fleecebox_extent piece = fleecebox_cut(&rest, MAX_TRANSFER);
            fleecebox_bytes bytes = {0};
            fleecebox_error error;
            if (!exports_fleecebox_provider_restore_method_image_read(image, piece.offset, (uint32_t)piece.length,
                                                                      &bytes, &error))
                return failed(FLEECEBOX_MOCK_NOT_GIVEN_BACK, "the image does not give back", piece, &error);
            bool is_right = memcmp(bytes.ptr, host.disk->bytes + piece.offset, piece.length) == 0;
            if (is_right)
                memcpy(host.backup->restored + piece.offset, bytes.ptr, piece.length);
            fleecebox_free_bytes(&bytes);
            if (!is_right)
                return failed(FLEECEBOX_MOCK_WRONG, "the image gives back other bytes than the disk held in", piece, NULL);
        }
    }
}

static bool restore_claimed(void)
{
    size_t from = 0;
    if (next_where(is_claimed, &from).length == 0)
        return true;
    fleecebox_bytes receipt = fleecebox_copy_bytes(host.backup->receipt.ptr, host.backup->receipt.len);
    exports_fleecebox_provider_restore_own_image_t image;
    fleecebox_error error;
    if (!exports_fleecebox_provider_restore_static_image_open(
            (exports_fleecebox_provider_restore_own_context_t){CONTEXT},
            (exports_fleecebox_provider_restore_own_objects_t){OBJECTS}, &receipt, &image, &error))
        return failed(FLEECEBOX_MOCK_NOT_OPENED, "the image cannot be opened", NOWHERE, &error);
    bool done = restore_claimed_with(host.image);
    exports_fleecebox_provider_restore_image_destructor(host.image);
    return done;
}
#endif

static void begin(fleecebox_mock_disk *disk)
{
    fleecebox_mock_backup *backup = grown(NULL, sizeof *backup);
    *backup = (fleecebox_mock_backup){0};
    disk->backups = grown(disk->backups, (disk->backups_count + 1) * sizeof *disk->backups);
    disk->backups[disk->backups_count++] = backup;
    memset(&host, 0, sizeof host);
    host.disk = disk;
    host.backup = backup;
    host.fault_call = disk->fault_call;
    host.fault_error = disk->fault_error;
    disk->fault_call = 0;
    host.blocks = grown(NULL, disk->blocks_count * sizeof *host.blocks);
    for (size_t index = 0; index < disk->blocks_count; index++) {
        const uint8_t *bytes = disk->bytes + index * BLOCK;
        uint64_t at = 0, length = length_of(index);
        while (at < length && bytes[at] == 0)
            at++;
        host.blocks[index] = (struct block){.dirty = disk->dirty[index], .zero = at == length, .cover = NOTHING};
    }
}

/* The finished objects are the backup's; the rest goes. */
static void end(void)
{
    fleecebox_mock_backup *backup = host.backup;
    for (size_t index = 0; index < host.objects_count; index++) {
        struct object *object = &host.objects[index];
        free(object->is_written);
        if (object->stage != FINISHED) {
            free(object->bytes);
            continue;
        }
        backup->objects = grown(backup->objects, (backup->objects_count + 1) * sizeof *backup->objects);
        backup->objects[backup->objects_count++] =
            (fleecebox_mock_object){copied_text(object->name), object->bytes, object->length};
    }
    free(host.objects);
    free(host.blocks);
    memset(&host, 0, sizeof host);
}

const fleecebox_mock_backup *fleecebox_mock_back_up(fleecebox_mock_disk *disk)
{
    begin(disk);
    bool done = run();
    if (done) {
        restore_placed();
        done = restore_claimed();
    }
    const fleecebox_mock_backup *backup = host.backup;
    end();
    if (done) {
        memset(disk->dirty, false, disk->blocks_count);
        disk->base = backup;
    }
    return backup;
}
