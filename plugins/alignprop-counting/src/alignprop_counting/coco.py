"""COCO class names, for full-size files without their own. Imports no torch."""

from __future__ import annotations

_BY_ID = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush"
)

DETR_NAMES = tuple(_BY_ID.split(","))
"""91 names by COCO category id; ids that COCO skips are `N/A`."""

COCO_NAMES = tuple(name for name in DETR_NAMES if name != "N/A")
"""The 80 names in the order of RT-DETR and YOLO."""
