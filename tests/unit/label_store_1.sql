-- A label store of schema 1, as that version made it, with some work in it.
CREATE TABLE meta (
	"key" VARCHAR NOT NULL,
	value VARCHAR NOT NULL,
	PRIMARY KEY ("key")
);
CREATE TABLE users (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	kind VARCHAR NOT NULL,
	name VARCHAR NOT NULL,
	role VARCHAR NOT NULL,
	password VARCHAR,
	active BOOLEAN NOT NULL,
	session INTEGER NOT NULL,
	created FLOAT NOT NULL,
	UNIQUE (kind, name)
);
CREATE TABLE login_failures (
	"key" VARCHAR NOT NULL,
	failures INTEGER NOT NULL,
	last FLOAT NOT NULL,
	PRIMARY KEY ("key")
);
CREATE TABLE queues (
	step VARCHAR NOT NULL,
	"by" VARCHAR NOT NULL,
	overlap INTEGER NOT NULL,
	minimum INTEGER,
	lease_minutes INTEGER NOT NULL,
	open BOOLEAN NOT NULL,
	PRIMARY KEY (step)
);
CREATE TABLE tasks (
	id VARCHAR NOT NULL,
	step VARCHAR,
	round INTEGER NOT NULL,
	origin VARCHAR NOT NULL,
	active BOOLEAN NOT NULL,
	split VARCHAR NOT NULL,
	prompt_id VARCHAR NOT NULL,
	messages TEXT NOT NULL,
	responses TEXT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TABLE events (
	id INTEGER NOT NULL,
	at FLOAT NOT NULL,
	user_id INTEGER,
	kind VARCHAR NOT NULL,
	task_id VARCHAR,
	detail TEXT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TABLE assignments (
	id VARCHAR NOT NULL,
	task_id VARCHAR NOT NULL,
	user_id INTEGER NOT NULL,
	token VARCHAR NOT NULL,
	display_order TEXT NOT NULL,
	state VARCHAR NOT NULL,
	leased FLOAT NOT NULL,
	expires FLOAT NOT NULL,
	draft TEXT,
	draft_revision INTEGER NOT NULL,
	PRIMARY KEY (id),
	UNIQUE (task_id, user_id),
	FOREIGN KEY(task_id) REFERENCES tasks (id),
	FOREIGN KEY(user_id) REFERENCES users (id),
	UNIQUE (token)
);
CREATE INDEX ix_assignments_user_id ON assignments (user_id);
CREATE INDEX ix_assignments_task_id ON assignments (task_id);
CREATE TABLE rankings (
	id VARCHAR NOT NULL,
	assignment_id VARCHAR NOT NULL,
	task_id VARCHAR NOT NULL,
	user_id INTEGER NOT NULL,
	revision INTEGER NOT NULL,
	status VARCHAR NOT NULL,
	ranks TEXT,
	reason VARCHAR,
	late BOOLEAN NOT NULL,
	source VARCHAR NOT NULL,
	by_hand BOOLEAN NOT NULL,
	created FLOAT NOT NULL,
	superseded_by VARCHAR,
	PRIMARY KEY (id),
	UNIQUE (assignment_id, revision),
	FOREIGN KEY(assignment_id) REFERENCES assignments (id),
	FOREIGN KEY(task_id) REFERENCES tasks (id),
	FOREIGN KEY(user_id) REFERENCES users (id)
);
CREATE INDEX ix_rankings_task_id ON rankings (task_id);
CREATE INDEX ix_rankings_user_id ON rankings (user_id);
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
INSERT INTO meta VALUES ('schema', '1'), ('secret:pseudonyms', '00'), ('secret:sessions', '01');
INSERT INTO users VALUES (1, 'person', 'ann', 'annotator', NULL, 1, 0, 1.0);
INSERT INTO users VALUES (2, 'simulated', 'sim-1', 'annotator', NULL, 1, 0, 1.0);
INSERT INTO queues VALUES ('rank', 'people', 1, NULL, 30, 1);
INSERT INTO tasks VALUES ('00000aa1', 'rank', 1, 'o', 1, 'train', 'p1', '[{"content":"one","role":"user"}]', '["a","b","c"]');
INSERT INTO tasks VALUES ('00000bb2', 'rank', 1, 'o', 1, 'train', 'p2', '[{"content":"two","role":"user"}]', '["a","b","c"]');
INSERT INTO tasks VALUES ('00000cc3', 'rank', 1, 'o', 1, 'train', 'p3', '[{"content":"three","role":"user"}]', '["a","b","c"]');
INSERT INTO assignments VALUES ('as1', '00000aa1', 1, 't1', '[0,1,2]', 'ranked', 1.0, 2.0, '[1,2,3]', 3);
INSERT INTO assignments VALUES ('as2', '00000bb2', 1, 't2', '[2,0,1]', 'leased', 1.0, 9999999999.0, '[null,1,2]', 2);
INSERT INTO assignments VALUES ('as3', '00000cc3', 2, 't3', '[0,1,2]', 'ranked', 1.0, 2.0, NULL, 0);
INSERT INTO rankings VALUES ('r1', 'as1', '00000aa1', 1, 1, 'ranked', '[1,2,3]', NULL, 0, 'app', 0, 1.0, NULL);
INSERT INTO rankings VALUES ('r3', 'as3', '00000cc3', 2, 1, 'ranked', '[3,2,1]', NULL, 0, 'simulated', 0, 1.0, NULL);
INSERT INTO events VALUES (1, 1.0, 1, 'submit', '00000aa1', '{}');
