/* The mock answers as the real host does: the calls of `guest-sdk/calls.txt`, each with the host's answer. */

#include "mock.h"

#undef NDEBUG
#include <assert.h>
#include <inttypes.h>

static const char *const ERRORS[] = {"cancelled", "discarded",    "exists",         "io",        "invalid-name", "not-dirty",
                                     "not-found", "out-of-range", "quota-exceeded", "too-large", "other"};

/* What the provider does wrong, in turn. */
static enum { NOTHING_WRONG, GIVES_BACK_WRONG, REFUSES, DOES_NOT_OPEN, COVERS_HALF, LEAKS, SPEAKS } mistake;

struct call {
    char name[16], word[300];
    fleecebox_extent range;
    int64_t first;
};

/* What answers a call: `*number` is -1 where there is no other answer than success. */
typedef bool answering(void *with, const struct call *call, int64_t *number, fleecebox_error *error);

/* Makes the calls of a section. */
static void ask(const char *section, answering *answer, void *with)
{
    FILE *file = fopen("../../calls.txt", "r");
    char line[512], header[64], words[400], expected[64], got[64];
    bool is_here = false;
    unsigned asked = 0;
    assert(file != NULL);
    snprintf(header, sizeof header, "[%s]\n", section);
    while (fgets(line, sizeof line, file) != NULL) {
        if (line[0] == '[')
            is_here = strcmp(line, header) == 0;
        if (!is_here || strchr("[#\n", line[0]) != NULL)
            continue;
        assert(sscanf(line, "%399[^=]= %63s", words, expected) == 2);
        struct call call = {0};
        int used = 0;
        assert(sscanf(words, "%15s %n", call.name, &used) == 1);
        if (sscanf(words + used, "%" SCNu64 " %" SCNu64, &call.range.offset, &call.range.length) < 1 ||
            strcmp(call.name, "create") == 0 || strcmp(call.name, "finish") == 0)
            sscanf(words + used, "%299s %" SCNu64 " %" SCNu64, call.word, &call.range.offset, &call.range.length);
        int64_t number = -1;
        fleecebox_error error = {0};
        if (!answer(with, &call, &number, &error))
            snprintf(got, sizeof got, "%s", ERRORS[error.tag]);
        else if (number >= 0)
            snprintf(got, sizeof got, "%" PRId64, number);
        else
            snprintf(got, sizeof got, "ok");
        if (strcmp(got, expected) != 0) {
            fprintf(stderr, "%s= %s, and the host says %s\n", words, got, expected);
            exit(1);
        }
        asked++;
    }
    fclose(file);
    assert(asked > 0);
}

struct running {
    fleecebox_volume *volume;
    const fleecebox_archive *archive;
    struct {
        char name[300];
        fleecebox_output_stream stream;
    } objects[4];
    unsigned count;
};

static fleecebox_output_stream *stream_of(struct running *running, const char *name)
{
    for (unsigned index = running->count; index-- > 0;)
        if (strcmp(running->objects[index].name, name) == 0)
            return &running->objects[index].stream;
    abort();
}

static bool answer_run(void *with, const struct call *call, int64_t *number, fleecebox_error *error)
{
    struct running *running = with;
    fleecebox_volume *volume = running->volume;
    const fleecebox_snapshot *snapshot = &volume->snapshot;
    fleecebox_extent range = call->range;
    fleecebox_bytes bytes;
    uint64_t size;
#define IS(word) (strcmp(call->name, word) == 0)
    if (IS("max-read"))
        return *number = fleecebox_max_read(volume->reader), true;
    if (IS("read")) {
        if (!fleecebox_read(volume->reader, range.offset, (uint32_t)range.length, &bytes, error))
            return false;
        return fleecebox_free_bytes(&bytes), true;
    }
    if (IS("put"))
        return fleecebox_put(running->archive, snapshot, range, FLEECEBOX_ZSTD, error);
    if (IS("discard"))
        return fleecebox_discard(volume->discarder, range, error);
    if (IS("create")) {
        assert(running->count < 4);
        snprintf(running->objects[running->count].name, sizeof running->objects->name, "%s", call->word);
        fleecebox_output_stream *stream = &running->objects[running->count].stream;
        if (!fleecebox_create(running->archive, call->word, FLEECEBOX_ZSTD, stream, error))
            return false;
        return running->count++, true;
    }
    if (IS("copy")) {
        if (!fleecebox_read(volume->reader, range.offset, (uint32_t)range.length, &bytes, error))
            return false;
        bool written = fleecebox_write(stream_of(running, call->word), bytes.ptr, bytes.len, error);
        return fleecebox_free_bytes(&bytes), written;
    }
    if (IS("splice"))
        return fleecebox_splice(stream_of(running, call->word), snapshot, range, error);
    if (IS("claim"))
        return fleecebox_claim(stream_of(running, call->word), snapshot, range, error);
    if (IS("finish")) {
        if (!fleecebox_finish(stream_of(running, call->word), &size, error))
            return false;
        return *number = (int64_t)size, true;
    }
    abort();
}

static bool run(const fleecebox_context *job, fleecebox_volume *volume, const fleecebox_archive *archive,
                const fleecebox_bytes *base, fleecebox_bytes *receipt, fleecebox_error *error)
{
    struct running running = {.volume = volume, .archive = archive};
    const char *image = base == NULL ? "image" : "image of the incremental";
    if (mistake == SPEAKS) {
        fleecebox_bytes attachment = {0};
        char *settings = fleecebox_settings_text(job), *id = fleecebox_id(job);
        assert(strcmp(settings, "depth = 7") == 0 && id[0] != 0);
        assert(fleecebox_attachment(job, "guest-config", &attachment) && attachment.len == 9);
        assert(!fleecebox_attachment(job, "firewall-config", &attachment));
        fleecebox_free_bytes(&attachment);
        free(settings);
        free(id);
        fleecebox_info(job, "%s, %s", volume->reader != NULL ? "reader" : "no reader",
                       volume->discarder != NULL ? "discarder" : "no discarder");
        return fleecebox_fail(error, "it is no use");
    }
    if (mistake == COVERS_HALF)
        return fleecebox_put(archive, &volume->snapshot, (fleecebox_extent){0, 65536}, FLEECEBOX_ZSTD, error);
    if (mistake == LEAKS)
        return fleecebox_create(archive, "index", FLEECEBOX_ZSTD, &running.objects[0].stream, error);
    ask(base == NULL ? "full" : "incremental", answer_run, &running);
    *receipt = fleecebox_copy_bytes(image, strlen(image) + 1);
    return true;
}

static bool answer_image(void *with, const struct call *call, int64_t *number, fleecebox_error *error)
{
    const fleecebox_objects *objects = with;
    uint64_t size;
    if (strcmp(call->name, "size") == 0) {
        if (!fleecebox_object_size(objects, call->word, &size, error))
            return false;
        return *number = (int64_t)size, true;
    }
    uint8_t *bytes = malloc(call->range.length);
    bool done = fleecebox_read_object(objects, call->word, call->range.offset, bytes, call->range.length, error);
    free(bytes);
    return done;
}

static fleecebox_objects opened;

static bool image_open(const fleecebox_context *job, fleecebox_objects objects, const fleecebox_bytes *receipt,
                       void **image, fleecebox_error *error)
{
    if (mistake == DOES_NOT_OPEN)
        return fleecebox_fail(error, "it does not open");
    ask((const char *)receipt->ptr, answer_image, &objects);
    opened = objects;
    *image = &opened;
    return true;
}

static bool image_read(void *image, uint64_t offset, uint32_t length, uint8_t *bytes, fleecebox_error *error)
{
    if (mistake == REFUSES) {
        error->tag = FLEECEBOX_NOT_FOUND;
        return false;
    }
    if (!fleecebox_read_object(image, "claims", offset - 65536, bytes, length, error))
        return false;
    bytes[length - 1] ^= mistake == GIVES_BACK_WRONG;
    return true;
}

static void image_close(void *image)
{
}

FLEECEBOX_EXPORT(run, image_open, image_read, image_close)

static fleecebox_mock_disk *disk(void)
{
    fleecebox_mock_disk *disk = fleecebox_mock_disk_new("da", 524800);
    uint8_t ones[327680];
    memset(ones, 1, sizeof ones);
    fleecebox_mock_write(disk, 0, ones, sizeof ones);
    fleecebox_mock_write(disk, 458752, ones, 66048);
    return disk;
}

static void answers_as_the_host_does(void)
{
    fleecebox_mock_disk *da = disk();
    for (int round = 0; round < 2; round++) {
        const fleecebox_mock_backup *backup = fleecebox_mock_back_up(da);
        if (backup->failure != FLEECEBOX_MOCK_NONE)
            fprintf(stderr, "%s\n", backup->why);
        assert(backup->failure == FLEECEBOX_MOCK_NONE);
        assert(memcmp(backup->restored, fleecebox_mock_bytes(da), 524800) == 0);
        assert(fleecebox_mock_object_of(backup, "spliced")->length == (round == 0 ? 131082 : 65546));
        fleecebox_mock_write(da, 65536, "\2", 1);
        fleecebox_mock_write(da, 200000, "\2", 1);
    }
    fleecebox_mock_disk_free(da);
}

static void finds_each_mistake_and_covers_it_again(void)
{
    static const struct {
        int mistake;
        fleecebox_mock_failure failure;
        const char *why;
    } cases[] = {
        {GIVES_BACK_WRONG, FLEECEBOX_MOCK_WRONG, "other bytes than the disk held in 65536..196608"},
        {REFUSES, FLEECEBOX_MOCK_NOT_GIVEN_BACK, "does not give back 65536..196608: not-found"},
        {DOES_NOT_OPEN, FLEECEBOX_MOCK_NOT_OPENED, "it does not open"},
        {COVERS_HALF, FLEECEBOX_MOCK_UNCOVERED, "65536..327680"},
        {LEAKS, FLEECEBOX_MOCK_LEAKED, "the object index was neither finished nor abandoned"},
        {SPEAKS, FLEECEBOX_MOCK_GAVE_UP, "it is no use"},
    };
    for (size_t index = 0; index < sizeof cases / sizeof *cases; index++) {
        fleecebox_mock_disk *da = disk();
        fleecebox_mock_set_settings(da, "depth = 7");
        fleecebox_mock_attach(da, "guest-config", "memory: 1", 9);
        mistake = cases[index].mistake;
        const fleecebox_mock_backup *backup = fleecebox_mock_back_up(da);
        if (strstr(backup->why, cases[index].why) == NULL)
            fprintf(stderr, "'%s', and not '%s'\n", backup->why, cases[index].why);
        assert(backup->failure == cases[index].failure && strstr(backup->why, cases[index].why) != NULL);
        mistake = NOTHING_WRONG;
        backup = fleecebox_mock_back_up(da);
        assert(backup->failure == FLEECEBOX_MOCK_NONE);
        fleecebox_mock_disk_free(da);
    }
}

static void grants_only_what_it_is_told_to(void)
{
    static const char *const said[] = {"reader, discarder", "reader, no discarder", "no reader, no discarder"};
    fleecebox_mock_disk *da = disk();
    fleecebox_mock_set_settings(da, "depth = 7");
    fleecebox_mock_attach(da, "guest-config", "memory: 1", 9);
    mistake = SPEAKS;
    for (int round = 0; round < 3; round++) {
        const fleecebox_mock_backup *backup = fleecebox_mock_back_up(da);
        assert(backup->log_count == 1 && strcmp(backup->log[0], said[round]) == 0);
        (round == 0 ? fleecebox_mock_withhold_discarder : fleecebox_mock_withhold_reader)(da);
    }
    mistake = NOTHING_WRONG;
    fleecebox_mock_disk_free(da);
}

static void passes_what_a_call_fails_with_on(void)
{
    fleecebox_mock_disk *da = disk();
    mistake = LEAKS;
    fleecebox_mock_fail(da, 1, FLEECEBOX_IO);
    const fleecebox_mock_backup *backup = fleecebox_mock_back_up(da);
    assert(backup->failure == FLEECEBOX_MOCK_GAVE_UP && backup->error == FLEECEBOX_IO);
    assert(fleecebox_mock_back_up(da)->failure == FLEECEBOX_MOCK_LEAKED);
    mistake = NOTHING_WRONG;
    fleecebox_mock_disk_free(da);
}

int main(void)
{
    answers_as_the_host_does();
    finds_each_mistake_and_covers_it_again();
    grants_only_what_it_is_told_to();
    passes_what_a_call_fails_with_on();
}
