PRAGMA user_version = 2;
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
CREATE TABLE outcomes (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, run_id TEXT NOT NULL, graft_id TEXT NOT NULL,
            report TEXT NOT NULL, UNIQUE (run_id, graft_id));
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
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('artifacts',3);
INSERT INTO "sqlite_sequence" VALUES('tag_moves',3);
INSERT INTO "sqlite_sequence" VALUES('audit',2);
COMMIT;
