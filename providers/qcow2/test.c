/* `make test`. That QEMU opens the images is tried where there is a QEMU: tests/tests/providers/languages.rs. */

#include "mock.h"

#undef NDEBUG
#include <assert.h>

#define SIZE (3 * 65536 + 9)

static uint64_t big_endian(const uint8_t *bytes, int length)
{
    uint64_t number = 0;
    for (int at = 0; at < length; at++)
        number = number << 8 | bytes[at];
    return number;
}

/* The cluster that holds an offset of the disk, by the image's own tables; 0 where it has none. */
static uint64_t cluster_of(const fleecebox_mock_object *image, uint64_t offset)
{
    uint64_t l1 = big_endian(image->bytes + 40, 8);
    uint64_t l2 = big_endian(image->bytes + l1, 8) & ~(1ULL << 63);
    return big_endian(image->bytes + l2 + offset / 65536 * 8, 8) & ~(1ULL << 63);
}

static const fleecebox_mock_backup *good_backup(fleecebox_mock_disk *disk)
{
    const fleecebox_mock_backup *backup = fleecebox_mock_back_up(disk);
    if (backup->failure != FLEECEBOX_MOCK_NONE)
        fprintf(stderr, "%s\n", backup->why);
    assert(backup->failure == FLEECEBOX_MOCK_NONE);
    assert(memcmp(backup->restored, fleecebox_mock_bytes(disk), SIZE) == 0);
    return backup;
}

static fleecebox_mock_disk *disk(void)
{
    fleecebox_mock_disk *disk = fleecebox_mock_disk_new("scsi0", SIZE);
    fleecebox_mock_write(disk, 70000, "something", 9);
    fleecebox_mock_write(disk, SIZE - 1, "!", 1);
    return disk;
}

static void an_image_holds_what_changed_where_its_tables_say(void)
{
    fleecebox_mock_disk *scsi0 = disk();
    const fleecebox_mock_backup *full = good_backup(scsi0);
    const fleecebox_mock_object *image = fleecebox_mock_object_of(full, "scsi0.qcow2");
    assert(memcmp(image->bytes, "QFI\xfb\0\0\0\3", 8) == 0 && big_endian(image->bytes + 24, 8) == SIZE);
    assert(cluster_of(image, 0) == 0 && cluster_of(image, 2 * 65536) == 0);
    assert(memcmp(image->bytes + cluster_of(image, 65536) + 70000 - 65536, "something", 9) == 0);
    assert(image->bytes[cluster_of(image, 3 * 65536) + 8] == '!');
    assert(image->length % 65536 == 0);

    /* What became zero hides what the image below says. */
    fleecebox_mock_write(scsi0, 70000, "\0\0\0\0\0\0\0\0", 9);
    const fleecebox_mock_backup *next = good_backup(scsi0);
    image = fleecebox_mock_object_of(next, "scsi0.qcow2");
    assert(cluster_of(image, 65536) == 1 && cluster_of(image, 3 * 65536) == 0);
    fleecebox_mock_disk_free(scsi0);
}

static void an_error_of_the_host_is_passed_on(void)
{
    for (unsigned nth = 1; nth < 10; nth++) {
        fleecebox_mock_disk *scsi0 = disk();
        fleecebox_mock_fail(scsi0, nth, FLEECEBOX_IO);
        const fleecebox_mock_backup *backup = fleecebox_mock_back_up(scsi0);
        assert(backup->failure == FLEECEBOX_MOCK_GAVE_UP && backup->error == FLEECEBOX_IO);
        fleecebox_mock_disk_free(scsi0);
    }
}

static void settings_are_refused(void)
{
    fleecebox_mock_disk *scsi0 = disk();
    fleecebox_mock_set_settings(scsi0, "level = 3");
    assert(strstr(fleecebox_mock_back_up(scsi0)->why, "no settings") != NULL);
    fleecebox_mock_disk_free(scsi0);
}

int main(void)
{
    an_image_holds_what_changed_where_its_tables_say();
    an_error_of_the_host_is_passed_on();
    settings_are_refused();
}
