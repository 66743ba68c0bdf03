/*
 * `qcow2`: a blind provider whose objects are disk images that QEMU opens by itself.
 *
 * Each backup keeps one object `VOLUME.qcow2` for each volume. That of a full backup is the whole disk. That of an
 * incremental holds what changed, and opens on top of the one before it:
 *
 *     qemu-img rebase -u -f qcow2 -F qcow2 -b EARLIER LATER
 *
 * So a backup can be read where there is no Fleecebox, with tools that everybody has. The host stores the objects as
 * they are (encoding `identity`), and restores them by itself as it does for every blind provider.
 *
 * The format is QEMU's docs/interop/qcow2.rst, version 3. An object can only be appended to, and its header says where
 * everything is. So the regions are asked for first and kept as two bits for each cluster (4 MiB for a TiB in clusters
 * of 64 KiB); then the length of every table is known before the first byte is written:
 *
 *     header | refcount table | refcount blocks | L1 table | L2 tables | data
 *
 * Clusters are blocks, so that a run of dirty blocks is a run of clusters. There are no settings.
 */
#include "fleecebox-guest.h"

/* QEMU reads clusters of 2^9 to 2^21 bytes. */
#define SMALLEST_CLUSTER 512
/* Every table is made and written through a buffer of one cluster; of its entries only this flag is QEMU's choice. */
#define COPIED ((uint64_t)1 << 63)
#define READS_AS_ZERO ((uint64_t)1)
/* Bytes of an entry: of the L1, the L2 and the refcount table; and of a refcount block, whose order is 4. */
#define ENTRY 8
#define REFCOUNT 2
#define REFCOUNT_ORDER 4
#define HEADER_LENGTH 104

/* What a cluster of the volume holds. */
enum cluster {
    /* Nothing that changed: the image below says, or it is zero. */
    UNALLOCATED = 0,
    DATA = 1,
    /* Hides what the image below says. */
    ZERO = 2,
};

/* The image's shape, in clusters unless named otherwise. */
struct image {
    uint64_t size; /* of the volume, in bytes */
    uint32_t cluster; /* in bytes */
    uint64_t clusters; /* of the volume, the last perhaps short */
    uint8_t *kinds; /* enum cluster, four to a byte */
    uint64_t l1_entries;
    uint64_t refcount_table, refcount_blocks, l1, l2, data;
};

static enum cluster kind_of(const struct image *image, uint64_t index)
{
    return image->kinds[index / 4] >> (index % 4 * 2) & 3;
}

static uint64_t divide_up(uint64_t dividend, uint64_t divisor)
{
    return dividend / divisor + (dividend % divisor > 0);
}

/* The clusters that one L2 table maps: `*first` and the one behind the last. */
static uint64_t end_of_table(const struct image *image, uint64_t table, uint64_t *first)
{
    uint64_t entries = image->cluster / ENTRY;
    *first = table * entries;
    return *first + entries < image->clusters ? *first + entries : image->clusters;
}

static bool table_is_needed(const struct image *image, uint64_t table)
{
    uint64_t index, end = end_of_table(image, table, &index);
    for (; index < end; index++)
        if (kind_of(image, index) != UNALLOCATED)
            return true;
    return false;
}

/* Asks what there is to back up. What is zero is noted only where there is a base that may say otherwise. */
static bool survey(struct image *image, fleecebox_volume *volume, bool has_base, fleecebox_error *error)
{
    fleecebox_volume_info info = fleecebox_snapshot_info(&volume->snapshot);
    if (info.block_size < SMALLEST_CLUSTER)
        return fleecebox_fail(error, "qcow2 has no clusters of %u bytes; the block size must be %u or more",
                              (unsigned)info.block_size, SMALLEST_CLUSTER);
    image->size = info.size;
    image->cluster = info.block_size;
    image->clusters = divide_up(info.size, info.block_size);
    image->kinds = calloc(image->clusters / 4 + 1, 1);
    if (image->kinds == NULL)
        return fleecebox_fail(error, "the provider's memory limit is too low for this volume: it needs %llu bytes",
                              (unsigned long long)image->clusters / 4);
    for (;;) {
        fleecebox_region region;
        if (!fleecebox_next_region(&volume->dirty, &region, error))
            return false;
        if (region.range.length == 0)
            return true;
        if (region.kind == FLEECEBOX_ZERO && !has_base)
            continue;
        uint64_t index = region.range.offset / image->cluster;
        uint64_t end = divide_up(fleecebox_end(region.range), image->cluster);
        for (; index < end; index++) {
            image->kinds[index / 4] |= (region.kind == FLEECEBOX_ZERO ? ZERO : DATA) << (index % 4 * 2);
            image->data += region.kind != FLEECEBOX_ZERO;
        }
    }
}

/* Says how long each part of the image is. Refcounts count the clusters that they themselves lie in, too. */
static void lay_out(struct image *image)
{
    image->l1_entries = divide_up(image->clusters, image->cluster / ENTRY);
    image->l1 = divide_up(image->l1_entries * ENTRY, image->cluster);
    for (uint64_t table = 0; table < image->l1_entries; table++)
        image->l2 += table_is_needed(image, table);
    for (uint64_t before = UINT64_MAX; before != image->refcount_blocks + image->refcount_table;) {
        before = image->refcount_blocks + image->refcount_table;
        uint64_t all = 1 + before + image->l1 + image->l2 + image->data;
        image->refcount_blocks = divide_up(all, image->cluster / REFCOUNT);
        image->refcount_table = divide_up(image->refcount_blocks * ENTRY, image->cluster);
    }
}

/* A cluster in the making, written when it is full. */
struct buffer {
    const fleecebox_output_stream *object;
    uint8_t *bytes;
    uint32_t length, used;
};

static bool flush(struct buffer *buffer, fleecebox_error *error)
{
    if (buffer->used == 0)
        return true;
    memset(buffer->bytes + buffer->used, 0, buffer->length - buffer->used);
    buffer->used = 0;
    return fleecebox_write(buffer->object, buffer->bytes, buffer->length, error);
}

/* Appends a number of so many bytes; all of qcow2 is big-endian. */
static bool append(struct buffer *buffer, uint64_t number, uint32_t bytes, fleecebox_error *error)
{
    for (uint32_t at = 0; at < bytes; at++)
        buffer->bytes[buffer->used + at] = (uint8_t)(number >> (bytes - 1 - at) * 8);
    buffer->used += bytes;
    return buffer->used < buffer->length || flush(buffer, error);
}

static bool write_header(const struct image *image, struct buffer *buffer, fleecebox_error *error)
{
    const struct {
        uint64_t number;
        uint32_t bytes;
    } fields[] = {
        {0x514649fb, 4}, /* "QFI" and 0xfb */
        {3, 4}, /* version */
        {0, 8}, /* the backing file's name: the archive does not say where that is */
        {0, 4}, /* and the name's length */
        {(uint64_t)__builtin_ctz(image->cluster), 4},
        {image->size, 8},
        {0, 4}, /* not encrypted */
        {image->l1_entries, 4},
        {(1 + image->refcount_table + image->refcount_blocks) * image->cluster, 8}, /* L1 table */
        {image->cluster, 8}, /* refcount table */
        {image->refcount_table, 4},
        {0, 4}, /* snapshots */
        {0, 8}, /* and where they are */
        {0, 8}, /* incompatible features */
        {0, 8}, /* compatible features */
        {0, 8}, /* autoclear features */
        {REFCOUNT_ORDER, 4},
        {HEADER_LENGTH, 4},
    };
    for (size_t field = 0; field < sizeof fields / sizeof *fields; field++)
        if (!append(buffer, fields[field].number, fields[field].bytes, error))
            return false;
    /* The zeroes behind it are the end of the header's extensions. */
    return flush(buffer, error);
}

static bool write_tables(const struct image *image, struct buffer *buffer, fleecebox_error *error)
{
    uint64_t l2_start = 1 + image->refcount_table + image->refcount_blocks + image->l1;
    uint64_t data_start = l2_start + image->l2;

    for (uint64_t block = 0; block < image->refcount_blocks; block++)
        if (!append(buffer, (1 + image->refcount_table + block) * image->cluster, ENTRY, error))
            return false;
    if (!flush(buffer, error))
        return false;
    for (uint64_t used = 0; used < data_start + image->data; used++)
        if (!append(buffer, 1, REFCOUNT, error))
            return false;
    if (!flush(buffer, error))
        return false;

    uint64_t next = l2_start;
    for (uint64_t table = 0; table < image->l1_entries; table++) {
        uint64_t entry = table_is_needed(image, table) ? next++ * image->cluster | COPIED : 0;
        if (!append(buffer, entry, ENTRY, error))
            return false;
    }
    if (!flush(buffer, error))
        return false;

    next = data_start;
    for (uint64_t table = 0; table < image->l1_entries; table++) {
        if (!table_is_needed(image, table))
            continue;
        uint64_t index, end = end_of_table(image, table, &index);
        for (; index < end; index++) {
            enum cluster kind = kind_of(image, index);
            uint64_t entry = kind == ZERO ? READS_AS_ZERO : kind == DATA ? next++ * image->cluster | COPIED : 0;
            if (!append(buffer, entry, ENTRY, error))
                return false;
        }
        if (!flush(buffer, error))
            return false;
    }
    return true;
}

/* Has the host copy the data clusters, run by run, and fills the last one up. */
static bool splice_data(const struct image *image, const fleecebox_output_stream *object,
                        const fleecebox_snapshot *source, struct buffer *buffer, fleecebox_error *error)
{
    for (uint64_t index = 0; index < image->clusters;) {
        uint64_t first = index;
        while (index < image->clusters && kind_of(image, index) == DATA)
            index++;
        if (index == first) {
            index++;
            continue;
        }
        uint64_t end = index * image->cluster;
        uint64_t missing = end > image->size ? end - image->size : 0;
        fleecebox_extent run = {first * image->cluster, end - missing - first * image->cluster};
        if (!fleecebox_splice(object, source, run, error))
            return false;
        memset(buffer->bytes, 0, missing);
        if (!fleecebox_write(object, buffer->bytes, missing, error))
            return false;
    }
    return true;
}

/* The receipt says how many images lie below this one. */
static const char RECEIPT[] = "qcow2 image on top of ";

static uint64_t depth_of(const fleecebox_context *job, const fleecebox_bytes *base)
{
    char text[64] = {0};
    if (base == NULL)
        return 0;
    if (base->len < sizeof text)
        memcpy(text, base->ptr, base->len);
    if (strncmp(text, RECEIPT, strlen(RECEIPT)) != 0) {
        fleecebox_warn(job, "the base was made by another provider: its image cannot be opened with QEMU's tools");
        return 1;
    }
    return strtoull(text + strlen(RECEIPT), NULL, 10) + 1;
}

static bool run(const fleecebox_context *job, fleecebox_volume *volume, const fleecebox_archive *archive,
                const fleecebox_bytes *base, fleecebox_bytes *receipt, fleecebox_error *error)
{
    char *settings = fleecebox_settings_text(job);
    bool has_settings = settings[strspn(settings, " \n")] != 0;
    free(settings);
    if (has_settings)
        return fleecebox_fail(error, "qcow2 has no settings; remove [provider.….settings]");

    struct image image = {0};
    if (!survey(&image, volume, base != NULL, error))
        return false;
    lay_out(&image);

    char name[128 + sizeof ".qcow2"];
    snprintf(name, sizeof name, "%s.qcow2", fleecebox_snapshot_info(&volume->snapshot).name);
    fleecebox_output_stream object;
    if (!fleecebox_create(archive, name, FLEECEBOX_IDENTITY, &object, error))
        return false;
    struct buffer buffer = {&object, malloc(image.cluster), image.cluster, 0};
    uint64_t size;
    if (buffer.bytes == NULL)
        return fleecebox_fail(error, "the provider's memory limit is too low");
    if (!write_header(&image, &buffer, error) || !write_tables(&image, &buffer, error) ||
        !splice_data(&image, &object, &volume->snapshot, &buffer, error) || !fleecebox_finish(&object, &size, error))
        return false;

    uint64_t depth = depth_of(job, base);
    fleecebox_info(job, "%llu bytes in `%s`, to be opened on top of %llu earlier images", (unsigned long long)size,
                   name, (unsigned long long)depth);
    char text[64];
    snprintf(text, sizeof text, "%s%llu", RECEIPT, (unsigned long long)depth);
    *receipt = fleecebox_copy_bytes(text, strlen(text));
    return true;
}

FLEECEBOX_EXPORT_BLIND(run)
