/*
 * A stand-in for Pyxis (https://github.com/NVIDIA/pyxis) on the test cluster. It is not Pyxis, and there is no enroot.
 *
 * It takes the options of Pyxis 0.24, unpacks the image (a squashfs file), and runs each task of the step in a mount
 * namespace of its own, with the image as root and real bind mounts. What it says when something is missing are the
 * words of Pyxis and enroot, so that whoever reads a job's log for them can be tested. What it does not do, and what
 * follows for tests, is written in docs/testcluster.md.
 *
 * Arguments, in plugstack.conf: data=DIR (where images are unpacked; each user writes there), registry=DIR (images that
 * `enroot import` would fetch: nvcr.io#nvidia/nemo:1 is DIR/nvcr.io#nvidia+nemo+1.sqsh).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_standin, 1)

enum { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENV, UNSHARE, VALUES };
enum { HOME, ROOT, ENTRYPOINT, ENTRYPOINT_LOG, WRITABLE, SWITCHES };

#define UNSET (-1)
#define MOST_MOUNTS 256

static char *value[VALUES];
static int on[SWITCHES] = { UNSET, UNSET, UNSET, UNSET, UNSET };
static char data[PATH_MAX], registry[PATH_MAX];

struct wish {
	char *source, *target, *flags;
	int fd, folder;
};

static int fail(const char *format, ...)
{
	char text[2 * PATH_MAX];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	slurm_error("pyxis: %s", text);
	return -1;
}

static int take_value(int which, const char *given, int remote)
{
	free(value[which]);
	value[which] = strdup(given ? given : "");
	return value[which] ? 0 : -1;
}

static int take_switch(int which, const char *given, int remote)
{
	int wanted = which < SWITCHES; /* the --no- forms come after the others */

	which %= SWITCHES;
	if (on[which] != UNSET && on[which] != wanted)
		return fail("an option and its opposite were both specified");
	on[which] = wanted;
	return 0;
}

static struct spank_option options[] = {
	{ "container-image", "[USER@][REGISTRY#]IMAGE[:TAG]|PATH", "[pyxis stand-in] image", 1, IMAGE, take_value },
	{ "container-mounts", "SRC:DST[:FLAGS][,SRC:DST...]", "[pyxis stand-in] bind mounts", 1, MOUNTS, take_value },
	{ "container-workdir", "PATH", "[pyxis stand-in] working directory", 1, WORKDIR, take_value },
	{ "container-name", "NAME", "[pyxis stand-in] keep the container under a name", 1, NAME, take_value },
	{ "container-save", "PATH", "[pyxis stand-in] refused", 1, SAVE, take_value },
	{ "container-env", "NAME[,NAME...]", "[pyxis stand-in] names that beat the image's", 1, ENV, take_value },
	{ "container-unshare", "NS[,NS...]", "[pyxis stand-in] refused", 1, UNSHARE, take_value },
	{ "container-mount-home", NULL, "[pyxis stand-in] mount home", 0, HOME, take_switch },
	{ "no-container-mount-home", NULL, "[pyxis stand-in] do not", 0, SWITCHES + HOME, take_switch },
	{ "container-remap-root", NULL, "[pyxis stand-in] be root inside", 0, ROOT, take_switch },
	{ "no-container-remap-root", NULL, "[pyxis stand-in] be the user", 0, SWITCHES + ROOT, take_switch },
	{ "container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, ENTRYPOINT, take_switch },
	{ "no-container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, SWITCHES + ENTRYPOINT, take_switch },
	{ "container-entrypoint-log", NULL, "[pyxis stand-in] ignored", 0, ENTRYPOINT_LOG, take_switch },
	{ "container-writable", NULL, "[pyxis stand-in] root may be written", 0, WRITABLE, take_switch },
	{ "container-readonly", NULL, "[pyxis stand-in] it may not", 0, SWITCHES + WRITABLE, take_switch },
};

int slurm_spank_init(spank_t sp, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "data=", 5))
			snprintf(data, sizeof(data), "%s", argv[i] + 5);
		else if (!strncmp(argv[i], "registry=", 9))
			snprintf(registry, sizeof(registry), "%s", argv[i] + 9);
		else
			return fail("unknown argument %s", argv[i]);
	}
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_REMOTE)
		return 0;
	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			return fail("couldn't register option %s", options[i].name);
	return 0;
}

/* Run a command to its end, its output to the task's own; its exit code, 128 + N for signal N. */
static int run(const char *const argv[])
{
	int status;
	pid_t child = fork();

	if (child == 0) {
		char *environment[] = { "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL };
		execve(argv[0], (char *const *)argv, environment);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) < 0)
		return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Make folders down to `path`; or, where `file`, an empty file there. */
static int make(const char *path, int file)
{
	char part[PATH_MAX];
	struct stat found;
	int fd;

	if (stat(path, &found) == 0)
		return 0;
	snprintf(part, sizeof(part), "%s", path);
	for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (mkdir(part, 0755) < 0 && errno != EEXIST)
			return -1;
		*slash = '/';
	}
	if (!file)
		return mkdir(part, 0755) < 0 && errno != EEXIST ? -1 : 0;
	fd = open(part, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
	return fd < 0 ? -1 : close(fd);
}

/* The unpacked image; made by the first who needs it. */
static int unpack(const char *image, const char *root)
{
	char lock[PATH_MAX + 8], part[PATH_MAX + 8];
	struct stat found;
	int fd, code = 0;

	snprintf(lock, sizeof(lock), "%s.lock", root);
	snprintf(part, sizeof(part), "%s.part", root);
	fd = open(lock, O_CREAT | O_RDWR | O_CLOEXEC, 0666);
	if (fd < 0 || flock(fd, LOCK_EX) < 0)
		return fail("couldn't lock %s: %s", lock, strerror(errno));
	if (stat(root, &found) < 0) {
		if (stat(image, &found) < 0) {
			fail("failed to create container filesystem for image: %s", value[IMAGE]);
			fail("printing enroot log file:");
			code = fail("    [ERROR] No such file or directory: %s", image);
		} else {
			const char *const argv[] = { "/usr/bin/unsquashfs", "-quiet", "-no-progress", "-no-xattrs",
						     "-processors", "1", "-force", "-dest", part, image, NULL };
			int ended = run(argv);
			if (ended == 0 && rename(part, root) < 0)
				ended = errno;
			if (ended >= 128) /* the step is being ended, since another node has failed */
				code = fail("interrupted");
			else if (ended) {
				fail("failed to create container filesystem for image: %s", value[IMAGE]);
				fail("printing enroot log file:");
				code = fail("    [ERROR] Invalid image format: %s", image);
			}
		}
	}
	close(fd);
	return code;
}

/* Mount options with + between them, for a mount that is there. In a user namespace locked flags must be kept. */
static int apply_flags(const char *target, const char *given)
{
	static const struct { const char *name; unsigned long set, clear; } known[] = {
		{ "ro", MS_RDONLY, 0 }, { "rw", 0, MS_RDONLY }, { "nosuid", MS_NOSUID, 0 },
		{ "nodev", MS_NODEV, 0 }, { "noexec", MS_NOEXEC, 0 },
		{ "rprivate", 0, 0 }, { "rslave", 0, 0 }, { "private", 0, 0 }, { "slave", 0, 0 },
		{ "bind", 0, 0 }, { "rbind", 0, 0 },
	};
	struct statvfs has;
	unsigned long flags = 0;
	char *copy = strdup(given), *rest = copy, *word;

	if (statvfs(target, &has) < 0)
		return -1;
	flags |= has.f_flag & ST_NOSUID ? MS_NOSUID : 0;
	flags |= has.f_flag & ST_NODEV ? MS_NODEV : 0;
	flags |= has.f_flag & ST_NOEXEC ? MS_NOEXEC : 0;
	flags |= has.f_flag & ST_RDONLY ? MS_RDONLY : 0;
	flags |= has.f_flag & ST_RELATIME ? MS_RELATIME : 0;
	flags |= has.f_flag & ST_NOATIME ? MS_NOATIME : 0;
	while ((word = strsep(&rest, "+"))) {
		size_t i = 0;
		while (i < sizeof(known) / sizeof(*known) && strcmp(known[i].name, word))
			i++;
		if (i == sizeof(known) / sizeof(*known)) {
			errno = EINVAL;
			return -1;
		}
		flags = (flags | known[i].set) & ~known[i].clear;
	}
	free(copy);
	return mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | flags, NULL);
}

/* Below the image, before it becomes the root: what enroot mounts in every container. */
static int mount_system(const char *root)
{
	static const char *const folders[] = { "/proc", "/sys", "/dev" };
	static const char *const files[] = { "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/passwd", "/etc/group" };
	char target[PATH_MAX];

	for (size_t i = 0; i < sizeof(folders) / sizeof(*folders); i++) {
		snprintf(target, sizeof(target), "%s%s", root, folders[i]);
		if (make(target, 0) < 0 || mount(folders[i], target, NULL, MS_BIND | MS_REC, NULL) < 0)
			return fail("couldn't mount %s: %s", folders[i], strerror(errno));
	}
	snprintf(target, sizeof(target), "%s/tmp", root);
	if (make(target, 0) < 0 || mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755") < 0)
		return fail("couldn't mount /tmp: %s", strerror(errno));
	for (size_t i = 0; i < sizeof(files) / sizeof(*files); i++) {
		snprintf(target, sizeof(target), "%s%s", root, files[i]);
		if (access(files[i], F_OK) == 0 &&
		    (make(target, 1) < 0 || mount(files[i], target, NULL, MS_BIND, NULL) < 0))
			return fail("couldn't mount %s: %s", files[i], strerror(errno));
	}
	return 0;
}

static int read_wishes(struct wish *wishes, spank_t sp)
{
	int count = 0;
	char home[PATH_MAX], *text, *entry;

	if (on[HOME] == 1 && spank_getenv(sp, "HOME", home, sizeof(home)) == ESPANK_SUCCESS)
		wishes[count++] = (struct wish){ strdup(home), strdup(home), NULL, -1, 1 };
	text = value[MOUNTS] ? strdup(value[MOUNTS]) : NULL;
	while (text && (entry = strsep(&text, ",")) && count < MOST_MOUNTS) {
		char *source = strsep(&entry, ":"), *target = strsep(&entry, ":");
		if (!*source || (target && !*target))
			return fail("--container-mounts: invalid format: %s", source);
		wishes[count++] = (struct wish){ source, target ? target : source, entry, -1, 1 };
	}
	for (int i = 0; i < count; i++) {
		struct stat found;
		if (!strcmp(wishes[i].source, "tmpfs"))
			continue;
		if (stat(wishes[i].source, &found) < 0)
			return fail("--container-mounts: source path does not exist: %s", wishes[i].source);
		wishes[i].folder = S_ISDIR(found.st_mode);
		wishes[i].fd = open(wishes[i].source, O_PATH | O_CLOEXEC);
		if (wishes[i].fd < 0)
			return fail("couldn't open %s: %s", wishes[i].source, strerror(errno));
	}
	return count;
}

/* After the change of root, so that links in the image lead where they lead there. */
static int mount_wishes(struct wish *wishes, int count)
{
	for (int i = 0; i < count; i++) {
		struct wish *wish = &wishes[i];
		char source[64];
		int done;

		if (make(wish->target, !wish->folder) < 0)
			return fail("failed to mount: %s at %s: %s", wish->source, wish->target, strerror(errno));
		snprintf(source, sizeof(source), "/proc/self/fd/%d", wish->fd);
		if (wish->fd < 0)
			done = mount("tmpfs", wish->target, "tmpfs", 0, wish->flags);
		else
			done = mount(source, wish->target, NULL, MS_BIND | MS_REC, NULL);
		if (done == 0 && wish->fd >= 0 && wish->flags && *wish->flags)
			done = apply_flags(wish->target, wish->flags);
		if (done < 0)
			return fail("failed to mount: %s at %s: %s", wish->source, wish->target, strerror(errno));
	}
	return 0;
}

static int write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), code;

	if (fd < 0)
		return -1;
	code = write(fd, text, strlen(text)) < 0 ? -1 : 0;
	close(fd);
	return code;
}

/* A mount namespace of this task's own; who is not root needs a user namespace for it, as under enroot. */
static int enter_namespace(void)
{
	uid_t uid = geteuid();
	gid_t gid = getegid();
	char map[64];

	if (unshare(CLONE_NEWNS | (uid ? CLONE_NEWUSER : 0)) < 0)
		return fail("couldn't make a namespace: %s", strerror(errno));
	if (uid) {
		int inside = on[ROOT] == 1 ? 0 : (int)uid;
		if (write_text("/proc/self/setgroups", "deny") < 0)
			return fail("couldn't give up groups: %s", strerror(errno));
		snprintf(map, sizeof(map), "%d %u 1", inside, uid);
		if (write_text("/proc/self/uid_map", map) < 0)
			return fail("couldn't map the user: %s", strerror(errno));
		snprintf(map, sizeof(map), "%d %u 1", on[ROOT] == 1 ? 0 : (int)gid, gid);
		if (write_text("/proc/self/gid_map", map) < 0)
			return fail("couldn't map the group: %s", strerror(errno));
	}
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return fail("couldn't make mounts private: %s", strerror(errno));
	return 0;
}

static int beats_image(const char *name)
{
	char *text = value[ENV] ? strdup(value[ENV]) : NULL, *word;

	while (text && (word = strsep(&text, ",")))
		if (!strcmp(word, name))
			return 1;
	return 0;
}

static void copy_variable(spank_t sp, const char *from, const char *to, int overwrite)
{
	char text[256];

	if (spank_getenv(sp, from, text, sizeof(text)) == ESPANK_SUCCESS)
		spank_setenv(sp, to, text, overwrite);
}

/* The image's own environment, which wins unless --container-env says otherwise; and what torch is told. */
static int take_environment(spank_t sp)
{
	FILE *file = fopen("/etc/environment", "re");
	static const char *const locale[] = { "LANG", "LANGUAGE", "LC_ALL" };
	char line[65536], known[2];

	for (size_t i = 0; i < sizeof(locale) / sizeof(*locale); i++)
		if (!beats_image(locale[i]))
			spank_unsetenv(sp, locale[i]);
	while (file && fgets(line, sizeof(line), file)) {
		char *name = line, *text = strchr(line, '=');
		size_t length;

		if (!text || *line == '#')
			continue;
		*text++ = '\0';
		length = strcspn(text, "\n");
		text[length] = '\0';
		if (length > 1 && *text == '"' && text[length - 1] == '"') {
			text[length - 1] = '\0';
			text++;
		}
		spank_setenv(sp, name, text, !beats_image(name));
	}
	if (file)
		fclose(file);
	if (spank_getenv(sp, "PYTORCH_VERSION", known, sizeof(known)) != ESPANK_ENV_NOEXIST) {
		copy_variable(sp, "SLURM_PROCID", "RANK", 1);
		copy_variable(sp, "SLURM_LOCALID", "LOCAL_RANK", 1);
		copy_variable(sp, "SLURM_NTASKS", "WORLD_SIZE", 0);
		copy_variable(sp, "SLURM_LAUNCH_NODE_IPADDR", "MASTER_ADDR", 0);
	}
	return 0;
}

/* Where this step's, or this node's named, image is unpacked. */
static int root_of(spank_t sp, char *root, size_t size, char *node)
{
	uint32_t job = 0, step = 0, number = 0;

	if (spank_get_item(sp, S_JOB_ID, &job) || spank_get_item(sp, S_JOB_STEPID, &step) ||
	    spank_get_item(sp, S_JOB_NODEID, &number))
		return -1;
	if (value[NAME])
		snprintf(root, size, "%s/%s.%.*s", data, node, (int)strcspn(value[NAME], ":"), value[NAME]);
	else
		snprintf(root, size, "%s/step-%u.%u.%u", data, job, step, number);
	return 0;
}

static int find_image(char *path, size_t size)
{
	const char *name = value[IMAGE];

	if (*name == '/' || *name == '.') {
		snprintf(path, size, "%s", name);
		return 0;
	}
	snprintf(path, size, "%s/%s.sqsh", registry, name);
	for (char *c = path + strlen(registry) + 1; *c; c++)
		if (*c == '/' || *c == ':')
			*c = '+';
	if (access(path, R_OK) == 0)
		return 0;
	fail("failed to import docker image: %s", name);
	fail("printing enroot log file:");
	return fail("    [ERROR] URL https://%s returned error code: 404 Not Found", name);
}

int slurm_spank_task_init(spank_t sp, int argc, char **argv)
{
	static struct wish wishes[MOST_MOUNTS];
	char image[PATH_MAX] = "", root[PATH_MAX], node[256] = "node";
	int count;

	if (!value[IMAGE] && !value[NAME])
		return 0;
	if (value[SAVE] || value[UNSHARE])
		return fail("the stand-in knows no --container-save and no --container-unshare");
	spank_getenv(sp, "SLURMD_NODENAME", node, sizeof(node));
	if (root_of(sp, root, sizeof(root), node) < 0)
		return fail("couldn't get the ids of the step");
	if (access(root, F_OK) < 0) { /* a container of that name is taken as it is, whatever the image */
		if (!value[IMAGE])
			return fail("error: a container with name \"%s\" does not exist, and --container-image is not set",
				    value[NAME]);
		if (find_image(image, sizeof(image)) < 0)
			return -1;
	}
	if (unpack(image, root) < 0 || enter_namespace() < 0 || (count = read_wishes(wishes, sp)) < 0) {
		fail("couldn't start container");
		return -1;
	}
	if (mount(root, root, NULL, MS_BIND | MS_REC, NULL) < 0)
		return fail("couldn't mount the image: %s", strerror(errno));
	if (mount_system(root) < 0 || chdir(root) < 0)
		return -1;
	if (syscall(SYS_pivot_root, ".", ".") < 0)
		return fail("couldn't change the root: %s", strerror(errno));
	if (mount_wishes(wishes, count) < 0)
		return -1;
	if (umount2(".", MNT_DETACH) < 0)
		return fail("couldn't leave the node's root: %s", strerror(errno));
	if (on[WRITABLE] != 1 && apply_flags("/", "ro") < 0)
		return fail("couldn't make the root read-only: %s", strerror(errno));
	take_environment(sp);
	if (chdir(value[WORKDIR] ? value[WORKDIR] : "/") < 0)
		return fail("couldn't chdir to %s: %s", value[WORKDIR], strerror(errno));
	return 0;
}

/* The end of a step on a node: what had no name goes. */
int slurm_spank_exit(spank_t sp, int argc, char **argv)
{
	char root[PATH_MAX], lock[PATH_MAX + 8], part[PATH_MAX + 8];

	if (spank_context() != S_CTX_REMOTE || !value[IMAGE] || value[NAME])
		return 0;
	if (root_of(sp, root, sizeof(root), NULL) < 0)
		return 0;
	snprintf(lock, sizeof(lock), "%s.lock", root);
	snprintf(part, sizeof(part), "%s.part", root);
	const char *const remove[] = { "/bin/rm", "-rf", root, lock, part, NULL };
	run(remove);
	return 0;
}
