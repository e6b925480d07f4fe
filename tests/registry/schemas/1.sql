PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE artifacts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE,
        size_bytes INTEGER NOT NULL, metadata TEXT NOT NULL, record TEXT NOT NULL);
INSERT INTO "artifacts" VALUES(1,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',518,'{"adds_capacity": true, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000001", "blueprint_id": "kernel-1", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [4]}, "lineage": [], "mode": "add", "output_spec": {"dtype": "float32", "shape": [4]}, "parameter_count": 4, "position": "parallel", "zeroed": null}','{"toolchain": "torch 2.13.0"}');
INSERT INTO "artifacts" VALUES(2,'44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6',616,'{"adds_capacity": false, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000002", "blueprint_id": "kernel-2", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [8, "H", "W"]}, "lineage": [], "mode": "replace", "output_spec": {"dtype": "float32", "shape": [16, "OH", "OW"]}, "parameter_count": 20, "position": "parallel", "zeroed": null}','{}');
CREATE TABLE condemned (digest TEXT PRIMARY KEY, since_s REAL NOT NULL);
INSERT INTO "condemned" VALUES('3d4eab8f5fd47c92fea5eb5b1766886e394922871fbbcd7e1f443289bdd934df',1000.0);
CREATE TABLE tag_moves (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT, moved_at_s REAL NOT NULL);
INSERT INTO "tag_moves" VALUES(1,'mlp','latest','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',1000.0);
INSERT INTO "tag_moves" VALUES(2,'mlp','latest','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6',1000.0);
INSERT INTO "tag_moves" VALUES(3,'mlp','first','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',1000.0);
CREATE TABLE tags (
        name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT NOT NULL REFERENCES artifacts (digest), PRIMARY KEY (name, tag));
INSERT INTO "tags" VALUES('mlp','latest','44e6a51b5edd9d03ddd4ca1ce93f44121ff4728a4f60f286bddb2066d739a1f6');
INSERT INTO "tags" VALUES('mlp','first','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462');
CREATE INDEX tags_by_digest ON tags (digest);
CREATE INDEX tag_moves_by_name ON tag_moves (name, tag);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('artifacts',3);
INSERT INTO "sqlite_sequence" VALUES('tag_moves',3);
COMMIT;
