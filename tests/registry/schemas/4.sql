PRAGMA user_version = 4;
BEGIN TRANSACTION;
CREATE TABLE artifacts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE,
        size_bytes INTEGER NOT NULL, metadata TEXT NOT NULL, record TEXT NOT NULL, blueprint_id TEXT NOT NULL DEFAULT '', blueprint_digest TEXT NOT NULL DEFAULT '', mode TEXT NOT NULL DEFAULT '', position TEXT NOT NULL DEFAULT '', adds_capacity INTEGER NOT NULL DEFAULT 0, draws_random INTEGER NOT NULL DEFAULT 0, parameter_count BIGINT NOT NULL DEFAULT 0, dtype TEXT NOT NULL DEFAULT '', in_features BIGINT, out_features BIGINT, num_axes INTEGER NOT NULL DEFAULT 0, published_at_s DOUBLE PRECISION);
INSERT INTO "artifacts" VALUES(1,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',518,'{"adds_capacity": true, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000001", "blueprint_id": "kernel-1", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [4]}, "lineage": [], "mode": "add", "output_spec": {"dtype": "float32", "shape": [4]}, "parameter_count": 4, "position": "parallel", "zeroed": null}','{"toolchain": "torch 2.13.0"}','kernel-1','0000000000000000000000000000000000000000000000000000000000000001','add','parallel',1,0,4,'float32',4,4,0,NULL);
INSERT INTO "artifacts" VALUES(2,'44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6',616,'{"adds_capacity": false, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000002", "blueprint_id": "kernel-2", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [8, "H", "W"]}, "lineage": [], "mode": "replace", "output_spec": {"dtype": "float32", "shape": [16, "OH", "OW"]}, "parameter_count": 20, "position": "parallel", "zeroed": null}','{}','kernel-2','0000000000000000000000000000000000000000000000000000000000000002','replace','parallel',0,0,20,'float32',8,16,2,NULL);
CREATE TABLE audit (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, at_s DOUBLE PRECISION NOT NULL, actor TEXT NOT NULL,
            action TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL);
INSERT INTO "audit" VALUES(1,2000.0,'ann','deprecate','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6','');
INSERT INTO "audit" VALUES(2,2000.0,'ann','deprecate','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6','');
CREATE TABLE condemned (digest TEXT PRIMARY KEY, since_s REAL NOT NULL);
INSERT INTO "condemned" VALUES('3d4eab8f5fd47c92fea5eb5b1766886e394922871fbbcd7e1f443289bdd934df',1000.0);
CREATE TABLE deprecations (
            digest TEXT PRIMARY KEY, reason TEXT NOT NULL, successor TEXT, actor TEXT,
            deprecated_at_s DOUBLE PRECISION NOT NULL);
INSERT INTO "deprecations" VALUES('44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6','diverges','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462','ann',2000.0);
CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            blueprint_digest TEXT NOT NULL, toolchain TEXT NOT NULL, options TEXT NOT NULL,
            blueprint TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL,
            num_losses INTEGER NOT NULL, worker TEXT, leased_until_s DOUBLE PRECISION,
            artifact_id TEXT, report TEXT, submitted_by TEXT,
            submitted_at_s DOUBLE PRECISION NOT NULL,
            UNIQUE (blueprint_digest, toolchain, options));
INSERT INTO "jobs" VALUES(1,'c6a1ac31e3c349b424f61e0d349ba44e','b0e4d81f69ef88c4277146ebfa442cff8daf7767689138a2a837d2fc858174eb','any','{"batch":8,"size":32}','{"adds_capacity":true,"draws_random":false,"edges":[{"position":0,"source":"up","target":"act"},{"position":0,"source":"act","target":"down"},{"position":0,"source":"down","target":"output"},{"position":0,"source":"input","target":"up"}],"format_version":1,"id":"mlp","init_seed":1,"input_spec":{"dtype":"float32","shape":["*",6]},"mode":"add","nodes":[{"attributes":{"type":"tanh"},"id":"act","op_type":"activation"},{"attributes":{"in_features":3,"out_features":6},"id":"down","op_type":"linear"},{"attributes":{"in_features":6,"out_features":3},"id":"up","op_type":"linear"}],"output_spec":{"dtype":"float32","shape":["*",6]},"position":"parallel"}','COMPILING',1,0,'w',1000.0,NULL,NULL,'ann',1000.0);
INSERT INTO "jobs" VALUES(2,'c82e7d841672d7c62d2d657c0c1ba0e6','0ade1d84c9f150d1558bd98e60c4d0d97a2e554af075d43730529e9c3aa2066a','any','{"batch":8,"size":32}','{"adds_capacity":true,"draws_random":false,"edges":[{"position":0,"source":"up","target":"act"},{"position":0,"source":"act","target":"down"},{"position":0,"source":"down","target":"output"},{"position":0,"source":"input","target":"up"}],"format_version":1,"id":"mlp","init_seed":2,"input_spec":{"dtype":"float32","shape":["*",6]},"mode":"add","nodes":[{"attributes":{"type":"tanh"},"id":"act","op_type":"activation"},{"attributes":{"in_features":3,"out_features":6},"id":"down","op_type":"linear"},{"attributes":{"in_features":6,"out_features":3},"id":"up","op_type":"linear"}],"output_spec":{"dtype":"float32","shape":["*",6]},"position":"parallel"}','UNVALIDATED',0,0,NULL,NULL,NULL,NULL,'ann',1010.0);
INSERT INTO "jobs" VALUES(3,'2e8851df16057a665fff4fa6a7c6fb7e','64a6b26ad32a7136ed30e5fff05984c092f71bd9adf8a15c529313ccc1dca515','any','{"batch":8,"size":32}','{"adds_capacity":true,"draws_random":false,"edges":[{"position":0,"source":"up","target":"act"},{"position":0,"source":"act","target":"down"},{"position":0,"source":"down","target":"output"},{"position":0,"source":"input","target":"up"}],"format_version":1,"id":"mlp","init_seed":3,"input_spec":{"dtype":"float32","shape":["*",6]},"mode":"add","nodes":[{"attributes":{"type":"tanh"},"id":"act","op_type":"activation"},{"attributes":{"in_features":3,"out_features":6},"id":"down","op_type":"linear"},{"attributes":{"in_features":6,"out_features":3},"id":"up","op_type":"linear"}],"output_spec":{"dtype":"float32","shape":["*",6]},"position":"parallel"}','UNVALIDATED',0,0,NULL,NULL,NULL,NULL,'ann',1020.0);
CREATE TABLE outcomes (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, run_id TEXT NOT NULL, graft_id TEXT NOT NULL,
            report TEXT NOT NULL, blueprint_digest TEXT NOT NULL DEFAULT '', site_kind TEXT NOT NULL DEFAULT '', UNIQUE (run_id, graft_id));
CREATE TABLE signatures (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, key_id TEXT NOT NULL,
            signed_at_s BIGINT NOT NULL, signature TEXT NOT NULL,
            UNIQUE (digest, key_id, signed_at_s, signature));
CREATE TABLE standings (
            of_blueprint TEXT NOT NULL, at_kind TEXT NOT NULL,
            effect DOUBLE PRECISION NOT NULL, standard_error DOUBLE PRECISION NOT NULL,
            lower_bound DOUBLE PRECISION NOT NULL, num_runs BIGINT NOT NULL,
            PRIMARY KEY (of_blueprint, at_kind));
CREATE TABLE tag_moves (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT, moved_at_s REAL NOT NULL, actor TEXT);
INSERT INTO "tag_moves" VALUES(1,'mlp','latest','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',1000.0,NULL);
INSERT INTO "tag_moves" VALUES(2,'mlp','latest','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6',1000.0,NULL);
INSERT INTO "tag_moves" VALUES(3,'mlp','first','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',1000.0,NULL);
CREATE TABLE tags (
        name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT NOT NULL REFERENCES artifacts (digest), PRIMARY KEY (name, tag));
INSERT INTO "tags" VALUES('mlp','latest','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6');
INSERT INTO "tags" VALUES('mlp','first','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462');
CREATE TABLE tokens (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
            scopes TEXT NOT NULL, created_at_s DOUBLE PRECISION NOT NULL,
            revoked_at_s DOUBLE PRECISION);
CREATE TABLE validations (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, report TEXT NOT NULL);
CREATE INDEX tags_by_digest ON tags (digest);
CREATE INDEX tag_moves_by_name ON tag_moves (name, tag);
CREATE INDEX artifacts_by_blueprint ON artifacts (blueprint_digest);
CREATE INDEX artifacts_by_fit ON artifacts (out_features, in_features, num_axes, dtype);
CREATE INDEX outcomes_by_digest ON outcomes (digest);
CREATE INDEX validations_by_digest ON validations (digest);
CREATE INDEX jobs_to_do ON jobs (status, leased_until_s, seq);
CREATE INDEX outcomes_by_blueprint ON outcomes (blueprint_digest, site_kind);
CREATE INDEX jobs_in_turn ON jobs ((CASE status WHEN 'UNVALIDATED' THEN submitted_at_s + 30.0 * num_losses WHEN 'COMPILING' THEN submitted_at_s + 30.0 * (num_losses + 1) END), seq);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('artifacts',3);
INSERT INTO "sqlite_sequence" VALUES('tag_moves',3);
INSERT INTO "sqlite_sequence" VALUES('audit',2);
INSERT INTO "sqlite_sequence" VALUES('jobs',3);
COMMIT;
